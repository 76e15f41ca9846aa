-- A full NOTIFY queue fails no producer, and one event is checked and matched with fewer expressions: PL/pgSQL builds each of
-- them anew in every transaction.

create function hookd.tell(what text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- Somebody listens in a transaction that does not end, and the queue of the whole server fills up: then every commit that
  -- carries a NOTIFY fails. Those of producers must not. An owner that sleeps reads once a second anyway.
  if pg_notification_queue_usage() < 0.9 then
    perform pg_notify('hookd', what);
  end if;
end
$$;
comment on function hookd.tell(text) is 'NOTIFY for the daemons, unless the queue of notifications is nearly full';

create or replace function hookd.wake(shards smallint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- A commit that carries a NOTIFY waits for every other such commit (3,700 instead of 13,600 commits/s from 16
  -- producers), so only a sleeper is told. Equal notifications of a transaction are sent once.
  if exists (select from hookd.shard s where s.id = any(shards) and pg_sequence_last_value(s.sleeper) = 2) then
    perform hookd.tell('');
  end if;
end
$$;

create or replace function hookd.endpoint_changed() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- endpoints change rarely: their owners are always told
  perform hookd.tell('endpoint');
  return null;
end
$$;

create or replace function hookd.valid_event(
  type text, tenant text, payload text, order_key text, coalesce_key text, idempotency_key text, headers jsonb)
returns boolean
language plpgsql immutable parallel safe
as $$
begin
  -- the rule, as one expression; what it does not take is looked at piece by piece
  if type <> '' and length(type) <= 255 and type = translate(type, E'* \t\n\r\f\x0b', '') and octet_length(type) = length(type)
     and tenant <> '' and length(tenant) <= 255
     and coalesce(greatest(length(order_key), length(coalesce_key), length(idempotency_key)) <= 1024, true)
     and coalesce(jsonb_typeof(headers) = 'object', true)
     and hookd.is_json(payload) then
    return true;
  end if;
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

create or replace function hookd.fan_out() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  one record;
  owed smallint;
  awake smallint[];
begin
  select n.id, n.tenant, n.type, n.payload, n.deliver_at, n.order_key, n.coalesce_key,
         exists (select from inserted offset 1) as more,
         -- hookd.type_patterns for the types that nearly everybody has, without its loop
         case length(n.type) - length(replace(n.type, '.', ''))
           when 0 then array['*', n.type]
           when 1 then array['*', n.type, split_part(n.type, '.', 1) || '.*']
           else hookd.type_patterns(n.type)
         end as patterns
    into one
    from inserted n
   limit 1;
  if one.id is null then
    return null;
  end if;
  if not one.more then
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
         and e.types && one.patterns
         and (e.filter is null or hookd.matches(e.filter, one.payload))
       order by e.key
      returning shard
    loop
      -- The flag of the shard's owner (hookd.shard.sleeper), by its name: what hookd.wake asks a table for costs 13 µs.
      if owed <> all(coalesce(awake, '{}')) then
        awake := awake || owed;
        if pg_sequence_last_value(('hookd.sleeper_' || owed)::regclass) = 2 then
          perform hookd.tell('');
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

select hookd.grant_roles();
