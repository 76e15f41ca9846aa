-- What a producer pays for. An INSERT of one event cost 214 µs of CPU where a plain table of the same shape takes 12; now 85.
-- The largest parts were: hookd.type_patterns as a SQL function with a subquery, called for each pair of event and endpoint
-- (45 µs); five check constraints, whose expressions PostgreSQL builds anew in every statement (25 to 45); a plan for sets
-- where there is one row (20); waking (13).

create or replace function hookd.type_patterns(type text) returns text[]
language plpgsql immutable strict parallel safe
as $$
declare
  patterns text[] := array['*', type];
  dot integer := 0;
begin
  -- 'a.b.c' is matched by: a.b.c, a.b.*, a.*, *
  for n in 1 .. length(type) - length(replace(type, '.', '')) loop
    dot := dot + strpos(substr(type, dot + 1), '.');
    patterns := patterns || (left(type, dot) || '*');
  end loop;
  return patterns;
end
$$;

do $version$
begin
  if current_setting('server_version_num')::integer >= 160000 then
    -- without an exception block, which is a subtransaction
    execute $function$
      create function hookd.is_json(payload text) returns boolean
      language sql immutable parallel safe
      as $$ select payload is json $$
    $function$;
  else
    execute $function$
      create function hookd.is_json(payload text) returns boolean
      language plpgsql immutable parallel safe
      as $$ begin return hookd.valid_payload(payload); end $$
    $function$;
  end if;
end
$version$;
comment on function hookd.is_json(text) is 'Whether a text is JSON';

create function hookd.valid_event(
  type text, tenant text, payload text, order_key text, coalesce_key text, idempotency_key text, headers jsonb)
returns boolean
language plpgsql immutable parallel safe
as $$
begin
  -- a regular expression costs 5 µs, and \s knows no more blanks than these in ASCII
  if type = '' or length(type) > 255 or strpos(type, '*') > 0
     or type <> translate(type, E' \t\n\r\f\x0b', '') or (octet_length(type) > length(type) and type ~ '\s') then
    raise exception 'hookd: the type of an event has 1 to 255 characters, none of them a blank or *: %', left(type, 300)
      using errcode = 'check_violation', constraint = 'event_type', table = 'event', schema = 'hookd',
            hint = 'Write for example user.created; patterns are for endpoints.';
  end if;
  if tenant = '' or length(tenant) > 255 then
    raise exception 'hookd: the tenant of an event has 1 to 255 characters'
      using errcode = 'check_violation', constraint = 'event_tenant', table = 'event', schema = 'hookd';
  end if;
  if length(order_key) > 1024 or length(coalesce_key) > 1024 or length(idempotency_key) > 1024 then
    raise exception 'hookd: the keys of an event (order_key, coalesce_key, idempotency_key) have at most 1024 characters'
      using errcode = 'check_violation', constraint = 'event_keys', table = 'event', schema = 'hookd';
  end if;
  if jsonb_typeof(headers) <> 'object' then
    raise exception 'hookd: the headers of an event are a JSON object, for example {"traceparent": "…"}'
      using errcode = 'check_violation', constraint = 'event_headers', table = 'event', schema = 'hookd';
  end if;
  -- the one that says what is wrong with it is asked only then
  return hookd.is_json(payload) or hookd.valid_payload(payload);
end
$$;
comment on function hookd.valid_event(text, text, text, text, text, text, jsonb) is
  'Whether an event can be taken; raises an exception that says why not';

alter table hookd.event
  add constraint event_is_valid
    check (hookd.valid_event(type, tenant, payload, order_key, coalesce_key, idempotency_key, headers)) not valid,
  drop constraint event_payload_is_json,
  drop constraint event_type,
  drop constraint event_tenant,
  drop constraint event_keys,
  drop constraint event_headers;

create or replace function hookd.fan_out() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  one record;
  patterns text[];
  owed smallint;
  awake smallint[];
begin
  select n.id, n.tenant, n.type, n.payload, n.deliver_at, n.order_key, n.coalesce_key,
         exists (select from inserted offset 1) as more
    into one
    from inserted n
   limit 1;
  if one.id is null then
    return null;
  end if;
  if not one.more then
    patterns := hookd.type_patterns(one.type);
    for owed in
      insert into hookd.delivery (shard, endpoint, event_id, due_at, order_key, coalesce_key)
      select e.shard, e.key, one.id,
             case when one.deliver_at > clock_timestamp() then one.deliver_at end,
             case when e.ordered then '' else one.order_key end,
             one.coalesce_key
        from hookd.endpoint e
       where e.tenant = one.tenant
         and (e.state in ('active', 'paused')
              or e.state = 'unverified' and (select s.value from hookd.setting s where s.name = 'security.unverified') = 'wait')
         and e.types && patterns
         and (e.filter is null or hookd.matches(e.filter, one.payload))
       order by e.key
      returning shard
    loop
      -- The flag of the shard's owner (hookd.shard.sleeper), by its name: what hookd.wake asks a table for costs 13 µs.
      if owed <> all(coalesce(awake, '{}')) then
        awake := awake || owed;
        if pg_sequence_last_value(('hookd.sleeper_' || owed)::regclass) = 2 then
          perform pg_notify('hookd', '');
        end if;
      end if;
    end loop;
    return null;
  end if;
  -- Ordered by event key: an unordered join gave 548,100 inversions in 1.2 million rows.
  with owed as (
    insert into hookd.delivery (shard, endpoint, event_id, due_at, order_key, coalesce_key)
    select e.shard, e.key, n.id,
           case when n.deliver_at > clock_timestamp() then n.deliver_at end,
           case when e.ordered then '' else n.order_key end,
           n.coalesce_key
      from (select i.*, hookd.type_patterns(i.type) as patterns from inserted i offset 0) n
      join hookd.endpoint e on e.tenant = n.tenant
       and (e.state in ('active', 'paused')
            or e.state = 'unverified' and (select s.value from hookd.setting s where s.name = 'security.unverified') = 'wait')
       and e.types && n.patterns
       and (e.filter is null or hookd.matches(e.filter, n.payload))
     order by n.key, e.key
    returning shard
  )
  select array_agg(distinct shard) into awake from owed;
  if awake is not null then
    perform hookd.wake(awake);
  end if;
  return null;
end
$$;

-- PostgreSQL 18 makes such ids itself, six times cheaper.
do $$
begin
  if current_setting('server_version_num')::integer >= 180000 then
    alter table hookd.event alter column id set default uuidv7();
  end if;
end
$$;
