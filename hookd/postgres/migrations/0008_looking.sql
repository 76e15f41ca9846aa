-- What the console and the API read: figures that the daemons counted, failures apart from what went well, and who did what.
-- Nothing here is written once a delivery.

create table hookd.tally (
  seconds smallint not null,
  at timestamptz not null,
  node text not null,
  delivery_id bigint not null,
  pending integer not null,
  oldest_s real not null,
  in_flight integer not null,
  figures jsonb not null,
  primary key (seconds, at, node)
) with (fillfactor = 50);
comment on table hookd.tally is 'What each daemon counted, by the minute and by the quarter of an hour, written every ten seconds: rates, latency and lag without counting hookd.attempt';
comment on column hookd.tally.seconds is '60 (kept for two days) or 900 (as long as attempts)';
comment on column hookd.tally.at is 'When the minute or the quarter began';
comment on column hookd.tally.delivery_id is 'The newest delivery then: says when a delivery was inserted, which its number alone does not';
comment on column hookd.tally.pending is 'In the queue then, of all daemons together; counted up to 200,000';
comment on column hookd.tally.figures is 'Counters: verdict.delivered, outcome.timeout, attempt_ms.250 (up to so many milliseconds), lag_ms.1000, …';

create table hookd.endpoint_hour (
  at timestamptz not null,
  endpoint integer not null,
  delivered integer not null,
  failed integer not null,
  total_ms double precision not null,
  slowest_ms real not null,
  primary key (at, endpoint)
) with (fillfactor = 70);
comment on table hookd.endpoint_hour is 'How each endpoint fared in each hour, by the attempts that its daemon made; written once a minute';
comment on column hookd.endpoint_hour.endpoint is 'hookd.endpoint.key';
comment on column hookd.endpoint_hour.total_ms is 'Of all its attempts together';

create table hookd.audit (
  id bigint primary key generated always as identity,
  at timestamptz not null default clock_timestamp(),
  via text not null check (via in ('console', 'api', 'cli')),
  who text not null,
  action text not null,
  tenant text,
  endpoint_id uuid,
  event_id uuid,
  delivery_id bigint,
  details jsonb not null default '{}'
);
create index audit_at on hookd.audit (at, id);
comment on table hookd.audit is 'Who did what to which endpoint, event or delivery: one row for each action of the console, the API and the command line';
comment on column hookd.audit.who is 'cli: user@machine; api: token, or loopback where none is set; and what the client said of itself';
comment on column hookd.audit.details is 'What was asked for; never a secret';

-- Empty for what is delivered: a success pays nothing for it.
create index attempt_failed on hookd.attempt (at, endpoint) where verdict <> 'delivered';
comment on index hookd.attempt_failed is 'failures by time, and those of one endpoint without reading the others';

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
    grant execute on function hookd.uuid7(), hookd.valid_payload(text), hookd.is_json(text),
      hookd.valid_event(text, text, text, text, text, text, jsonb), hookd.check_thin(uuid, bigint, text) to hookd_producer;
    grant execute on function
      hookd.send(text, text, text, text, timestamptz, timestamptz, text, text, jsonb),
      hookd.send(text, json, text, text, timestamptz, timestamptz, text, text, jsonb),
      hookd.send(text, jsonb, text, text, timestamptz, timestamptz, text, text, jsonb) to hookd_producer;
  end if;
  if to_regrole('hookd_reader') is not null then
    grant usage on schema hookd to hookd_reader;
    grant select on hookd.event, hookd.endpoint, hookd.delivery, hookd.attempt, hookd.dead_letter,
      hookd.delivery_status, hookd.node, hookd.partition, hookd.migration, hookd.setting, hookd.shard,
      hookd.tally, hookd.endpoint_hour, hookd.audit to hookd_reader;
    -- everything but the value: `hookd endpoint show` works for a reader
    grant select (id, endpoint, purpose, shown, created_at, expires_at) on hookd.endpoint_secret to hookd_reader;
    grant execute on function hookd.uuid7_floor(timestamptz), hookd.uuid7_time(uuid), hookd.check_thin(uuid, bigint, text),
      hookd.type_patterns(text), hookd.matches(jsonpath, text) to hookd_reader;
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
