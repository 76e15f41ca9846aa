-- Producers that prepare their transactions, rows that lie in no day yet, and several daemons that cut a day at once. An event of
-- its own takes fewer locks.

create or replace function hookd.tell(what text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- PREPARE TRANSACTION is refused after a NOTIFY, and whether an INSERT notifies depends on whether an owner sleeps: who
  -- prepares transactions sets hookd.notify to off.
  -- Somebody listens in a transaction that does not end, and the queue of the whole server fills up: then every commit that
  -- carries a NOTIFY fails. Those of producers must not. An owner that sleeps reads once a second anyway.
  if current_setting('hookd.notify', true) is distinct from 'off' and pg_notification_queue_usage() < 0.9 then
    perform pg_notify('hookd', what);
  end if;
end
$$;
comment on function hookd.tell(text) is
  'NOTIFY for the daemons, unless the queue of notifications is nearly full, or the setting hookd.notify is off';

create or replace function hookd.add_partition(parent text, ahead integer default 2) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  open_name text;
  open_day date;
  cut date;
  successor text;
  bound text;
  beyond text;
  fields text;
  strays boolean;
begin
  if parent not in ('event', 'attempt') then
    raise exception 'hookd: % has no partitions', parent;
  end if;
  -- One daemon at a time, and before it is seen which days there are: another would make the same one, and fail. The first
  -- number is two above that of the shards' locks.
  if not pg_try_advisory_xact_lock(1752133485, 0) then
    return null;
  end if;
  select name, first_day into strict open_name, open_day
    from hookd.partition p where p.parent = add_partition.parent and before_day is null;
  cut := greatest((now() at time zone 'utc')::date + ahead, open_day + 1);
  if open_day >= (now() at time zone 'utc')::date + ahead then
    return null;
  end if;
  successor := hookd.partition_name(parent, cut);
  bound := hookd.partition_bound(parent, cut::timestamp at time zone 'utc');
  -- built apart: nothing is locked that a producer needs
  execute format('create table hookd.%I (like hookd.%I including defaults including constraints including indexes including comments)',
                 successor, parent);
  execute format('alter table hookd.%I detach partition hookd.%I', parent, open_name);
  -- What lies beyond the cut already (ids that somebody made himself, a clock that was ahead) goes along, or the open partition
  -- could never be attached again. Neither of the two is a part of its parent now, so no trigger is called. Asked first: where
  -- everything is published, a DELETE in hookd.attempt is refused for want of a key, even if it finds nothing.
  beyond := format('hookd.%I where %I >= %s', open_name, case parent when 'event' then 'id' else 'at' end, bound);
  execute format('select exists (select from %s)', beyond) into strays;
  if strays then
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into fields
      from pg_attribute a
     where a.attrelid = format('hookd.%I', parent)::regclass and a.attnum > 0 and not a.attisdropped;
    execute format('with stray as (delete from %s returning %s) insert into hookd.%I (%s) select %s from stray',
                   beyond, fields, successor, fields, fields);
  end if;
  execute format('alter table hookd.%I attach partition hookd.%I for values from (%s) to (%s)',
                 parent, open_name, hookd.partition_bound(parent, open_day::timestamp at time zone 'utc'), bound);
  execute format('alter table hookd.%I attach partition hookd.%I for values from (%s) to (maxvalue)',
                 parent, successor, bound);
  return successor;
end
$$;
comment on function hookd.add_partition(text, integer) is
  'Cuts the next day off the open partition, if it is time and nobody else does; returns the new one''s name';

create or replace function hookd.drop_partition(parent text, before timestamptz) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  oldest text;
begin
  if parent not in ('event', 'attempt') then
    raise exception 'hookd: % has no partitions', parent;
  end if;
  if not pg_try_advisory_xact_lock(1752133485, 0) then
    return null;
  end if;
  select name into oldest from hookd.partition p
   where p.parent = drop_partition.parent and before_day::timestamp at time zone 'utc' <= before
   order by first_day limit 1;
  if oldest is not null then
    execute format('drop table hookd.%I', oldest);
  end if;
  return oldest;
end
$$;
comment on function hookd.drop_partition(text, timestamptz) is
  'Drops the oldest partition all of whose rows are older; returns its name, null if there is none or somebody else does';

-- A function, and one that is not inlined: a subselect is an InitPlan, for which the setting's table and its index are opened and
-- locked by every insert, even if all endpoints are verified. Cheap, so that it is still asked before an endpoint's filter.
create function hookd.unverified_waits() returns boolean
language plpgsql stable parallel safe cost 1 set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from hookd.setting s where s.name = 'security.unverified' and s.value = 'wait');
end
$$;
comment on function hookd.unverified_waits() is
  'Whether what is sent to an unverified endpoint waits until it is verified (security.unverified)';

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
         and (e.state in ('active', 'paused') or e.state = 'unverified' and hookd.unverified_waits())
         and e.types && patterns
         and (e.filter is null or hookd.matches(e.filter, one.payload))
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
