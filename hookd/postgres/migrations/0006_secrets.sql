-- Secrets at rest, and endpoints that have not shown yet that they want to be called.

alter table hookd.endpoint_secret add column shown text[];
comment on column hookd.endpoint_secret.value is
  'Plain text, or enc:v1:KEY:BASE64, AES-256-GCM under a master key that is not in the database (security.master_key_file)';
comment on column hookd.endpoint_secret.shown is
  'What may be shown of it: the public key of an ed25519 secret, the names of headers';
update hookd.endpoint_secret
   set shown = array(select k from json_object_keys(value::json) as k order by k)
 where purpose = 'headers';

alter table hookd.endpoint
  add column verified_at timestamptz,
  drop constraint endpoint_state_check,
  add constraint endpoint_state_check check (state in ('active', 'unverified', 'paused', 'disabled', 'removed'));
comment on column hookd.endpoint.state is
  'active; unverified: has not answered the challenge, gets nothing; paused: deliveries wait; disabled: gets none; removed: kept for the log until retention';
comment on column hookd.endpoint.verified_at is 'When its URL answered the challenge; null: it was not asked, or has not';

insert into hookd.setting values ('security.unverified', 'wait');

-- The setting is read only where an unverified endpoint subscribes to what was inserted: once a statement, as an InitPlan.
create or replace function hookd.fan_out() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  shards smallint[];
begin
  -- Ordered by event key: an unordered join gave 548,100 inversions in 1.2 million rows.
  with owed as (
    insert into hookd.delivery (shard, endpoint, event_id, due_at, order_key, coalesce_key)
    select e.shard, e.key, n.id,
           case when n.deliver_at > clock_timestamp() then n.deliver_at end,
           case when e.ordered then '' else n.order_key end,
           n.coalesce_key
      from inserted n
      join hookd.endpoint e on e.tenant = n.tenant
       and (e.state in ('active', 'paused')
            or e.state = 'unverified' and (select s.value from hookd.setting s where s.name = 'security.unverified') = 'wait')
       and e.types && hookd.type_patterns(n.type)
       and (e.filter is null or hookd.matches(e.filter, n.payload))
     order by n.key, e.key
    returning shard
  )
  select array_agg(distinct shard) into shards from owed;
  if shards is not null then
    perform hookd.wake(shards);
  end if;
  return null;
end
$$;

create or replace function hookd.grant_roles() returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  revoke all on all functions in schema hookd from public;
  if to_regrole('hookd_producer') is not null then
    grant usage on schema hookd to hookd_producer;
    grant insert (type, payload, tenant, idempotency_key, deliver_at, expires_at, order_key, coalesce_key, headers)
       on hookd.event to hookd_producer;
    grant select (id) on hookd.event to hookd_producer;
    grant usage on sequence hookd.event_key to hookd_producer;
    grant execute on function hookd.uuid7(), hookd.valid_payload(text), hookd.check_thin(uuid, bigint, text) to hookd_producer;
    grant execute on function
      hookd.send(text, text, text, text, timestamptz, timestamptz, text, text, jsonb),
      hookd.send(text, json, text, text, timestamptz, timestamptz, text, text, jsonb),
      hookd.send(text, jsonb, text, text, timestamptz, timestamptz, text, text, jsonb) to hookd_producer;
  end if;
  if to_regrole('hookd_reader') is not null then
    grant usage on schema hookd to hookd_reader;
    grant select on hookd.event, hookd.endpoint, hookd.delivery, hookd.attempt, hookd.dead_letter,
      hookd.delivery_status, hookd.node, hookd.partition, hookd.migration, hookd.setting, hookd.shard to hookd_reader;
    -- everything but the value: `hookd endpoint show` works for a reader
    grant select (id, endpoint, purpose, shown, created_at, expires_at) on hookd.endpoint_secret to hookd_reader;
    grant execute on function hookd.uuid7_floor(timestamptz), hookd.uuid7_time(uuid), hookd.check_thin(uuid, bigint, text) to hookd_reader;
  end if;
  if to_regrole('hookd_daemon') is not null then
    grant usage on schema hookd to hookd_daemon;
    grant select, insert, update, delete on all tables in schema hookd to hookd_daemon;
    grant usage, select, update on all sequences in schema hookd to hookd_daemon;
    grant execute on all functions in schema hookd to hookd_daemon;
    revoke insert, update, delete on hookd.migration from hookd_daemon;
  end if;
end
$$;

select hookd.grant_roles();
