-- Day partitions of hookd.event and hookd.attempt. The newest partition is open to MAXVALUE, so that no producer ever
-- fails, however long the daemon was off; the daemon cuts the days off it ahead of time and drops the old ones.
-- Both need ACCESS EXCLUSIVE on the parent for an instant. A lock request that waits blocks every producer behind it, so
-- they give up after 200 ms and the daemon tries again later.

create function hookd.partition_bound(parent text, at timestamptz) returns text
language sql stable
as $$
  select case parent when 'event' then quote_literal(hookd.uuid7_floor(at)) else quote_literal(at) end
$$;

create function hookd.partition_name(parent text, day date) returns text
language sql immutable
as $$ select parent || '_' || to_char(day, 'YYYYMMDD') $$;

create view hookd.partition as
select p.relname::text as parent, c.relname::text as name,
       to_date(right(c.relname, 8), 'YYYYMMDD') as first_day,
       lead(to_date(right(c.relname, 8), 'YYYYMMDD')) over (partition by p.relname order by c.relname) as before_day,
       c.oid as relation
  from pg_inherits i
  join pg_class c on c.oid = i.inhrelid
  join pg_class p on p.oid = i.inhparent
  join pg_namespace n on n.oid = p.relnamespace
 where n.nspname = 'hookd' and p.relname in ('event', 'attempt');
comment on view hookd.partition is 'The day partitions, UTC; before_day is null for the newest, which is open-ended';

do $$
declare
  parent text;
  today date := (now() at time zone 'utc')::date;
begin
  foreach parent in array array['event', 'attempt'] loop
    for n in -1..2 loop
      -- the first reaches back, so that a clock that is a little behind finds its place too
      execute format('create table hookd.%I partition of hookd.%I for values from (%s) to (%s)',
        hookd.partition_name(parent, today + n), parent,
        case when n = -1 then 'minvalue' else hookd.partition_bound(parent, (today + n)::timestamp at time zone 'utc') end,
        case when n = 2 then 'maxvalue' else hookd.partition_bound(parent, (today + n + 1)::timestamp at time zone 'utc') end);
    end loop;
  end loop;
end
$$;

create function hookd.add_partition(parent text, ahead integer default 2) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  open_name text;
  open_day date;
  cut date;
  successor text;
begin
  if parent not in ('event', 'attempt') then
    raise exception 'hookd: % has no partitions', parent;
  end if;
  select name, first_day into strict open_name, open_day
    from hookd.partition p where p.parent = add_partition.parent and before_day is null;
  cut := greatest((now() at time zone 'utc')::date + ahead, open_day + 1);
  if open_day >= (now() at time zone 'utc')::date + ahead then
    return null;
  end if;
  successor := hookd.partition_name(parent, cut);
  -- built apart: nothing is locked that a producer needs
  execute format('create table hookd.%I (like hookd.%I including defaults including constraints including indexes including comments)',
                 successor, parent);
  execute format('alter table hookd.%I detach partition hookd.%I', parent, open_name);
  execute format('alter table hookd.%I attach partition hookd.%I for values from (%s) to (%s)',
                 parent, open_name,
                 hookd.partition_bound(parent, open_day::timestamp at time zone 'utc'),
                 hookd.partition_bound(parent, cut::timestamp at time zone 'utc'));
  execute format('alter table hookd.%I attach partition hookd.%I for values from (%s) to (maxvalue)',
                 parent, successor, hookd.partition_bound(parent, cut::timestamp at time zone 'utc'));
  return successor;
end
$$;
comment on function hookd.add_partition(text, integer) is 'Cuts the next day off the open partition, if it is time; returns the new one''s name';

create function hookd.drop_partition(parent text, before timestamptz) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  oldest text;
begin
  if parent not in ('event', 'attempt') then
    raise exception 'hookd: % has no partitions', parent;
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
comment on function hookd.drop_partition(text, timestamptz) is 'Drops the oldest partition all of whose rows are older; returns its name, null if there is none';
