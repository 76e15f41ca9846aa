-- What users read, and who may do what.

create view hookd.delivery_status as
select distinct on (s.event_id, s.endpoint)
       s.event_id, e.id as endpoint_id, s.delivery_id, s.state, s.attempts, s.reason,
       s.last_attempt_at, s.last_status, s.next_attempt_at, s.replay, e.tenant, e.url
  from (
    select d.event_id, d.endpoint, d.id as delivery_id,
           case when d.attempt = 0 then 'pending' else 'retrying' end as state,
           d.attempt as attempts, null::text as reason, null::timestamptz as last_attempt_at, null::smallint as last_status,
           d.due_at as next_attempt_at, d.replay
      from hookd.delivery d
    union all
    select a.event_id, a.endpoint, a.delivery_id, a.verdict, a.attempt, a.reason, a.at, a.status, null, a.replay
      from hookd.attempt a
     where a.verdict in ('delivered', 'exhausted', 'expired', 'cancelled')
  ) s
  left join hookd.endpoint e on e.key = s.endpoint
 order by s.event_id, s.endpoint, s.delivery_id desc;
comment on view hookd.delivery_status is
  'One row for each event and endpoint, its newest delivery''s: pending, retrying, delivered, exhausted, expired, cancelled. Rows end with retention';

create function hookd.grant_roles() returns void
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
comment on function hookd.grant_roles() is 'Gives the three roles their rights; run by every migration, and again after the roles were made by hand';
select hookd.grant_roles();
