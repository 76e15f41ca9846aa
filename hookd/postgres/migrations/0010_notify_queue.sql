-- A full NOTIFY queue fails no producer.

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
