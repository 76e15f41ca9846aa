-- The tables of hookd, their roles, and the few functions that their definitions need.
-- No extension, no superuser: CREATEROLE makes the three roles, and without it an administrator makes them
-- beforehand (`hookd doctor` says which are missing).

do $$
declare
  name text;
begin
  foreach name in array array['hookd_producer', 'hookd_daemon', 'hookd_reader'] loop
    begin
      execute format('create role %I nologin', name);
    exception
      when duplicate_object or unique_violation then null;
      when insufficient_privilege then
        raise warning 'hookd: role % is missing and may not be created by %', name, current_user;
    end;
  end loop;
end
$$;

comment on schema hookd is
  'hookd delivers webhooks: insert into hookd.event (or call hookd.send) and every subscribed hookd.endpoint gets a signed POST';

-- Ids ----------------------------------------------------------------------------------------------------------

create function hookd.uuid7() returns uuid
language sql volatile parallel safe
as $$
  -- RFC 9562, 5.7: 48 bits of milliseconds, version 7, the rest random
  select encode(
    set_bit(set_bit(
      overlay(uuid_send(gen_random_uuid())
              placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
              from 1 for 6),
      52, 1), 53, 1), 'hex')::uuid
$$;
comment on function hookd.uuid7() is 'A new uuid that sorts by time (RFC 9562, version 7); PostgreSQL has its own from 18 on';

create function hookd.uuid7_floor(at timestamptz) returns uuid
language sql immutable parallel safe
as $$
  select (encode(substring(int8send((extract(epoch from at) * 1000)::bigint) from 3), 'hex') || repeat('0', 20))::uuid
$$;
comment on function hookd.uuid7_floor(timestamptz) is 'The smallest uuid of that millisecond: the bounds of event partitions, and search by time';

create function hookd.uuid7_time(id uuid) returns timestamptz
language sql immutable parallel safe
as $$
  select to_timestamp(('x0000' || substr(replace(id::text, '-', ''), 1, 12))::bit(64)::bigint / 1000.0)
$$;
comment on function hookd.uuid7_time(uuid) is 'When such an id was made, to the millisecond';

-- Settings and shards -------------------------------------------------------------------------------------------

create table hookd.setting (
  name text primary key,
  value text not null
);
comment on table hookd.setting is 'What the database has to know of the configuration; written by the daemon';

insert into hookd.setting values ('shards', '64'), ('retention.events', '2592000'), ('delivery.format', 'standard');

create table hookd.shard (
  id smallint primary key,
  sleeper regclass not null
);
comment on table hookd.shard is
  'A shard is a fixed slice of the endpoints, by hash of their host; at any moment one daemon at most owns it (pg_locks: advisory, classid 1752133483)';
comment on column hookd.shard.sleeper is
  'A sequence used as a flag: 2 while the owner sleeps and wants a NOTIFY, 1 while it reads anyway. A sequence is not MVCC: every producer sees it at once, and flipping it leaves no dead rows';

do $$
begin
  for n in 0..63 loop
    execute format('create sequence hookd.sleeper_%s', n);
    execute format('insert into hookd.shard values (%s, %L)', n, 'hookd.sleeper_' || n);
  end loop;
end
$$;

create function hookd.shard_of(host text) returns smallint
language sql stable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
  select ((get_byte(h, 0) * 256 + get_byte(h, 1))
          % (select value::integer from hookd.setting where name = 'shards'))::smallint
    from sha256(convert_to(host, 'UTF8')) as h
$$;
comment on function hookd.shard_of(text) is 'The shard of a host. SHA-256 and not hashtext: it must stay the same over major versions';

-- Endpoints -----------------------------------------------------------------------------------------------------

create sequence hookd.endpoint_key as integer;

create table hookd.endpoint (
  key integer primary key default nextval('hookd.endpoint_key'),
  shard smallint not null,
  id uuid not null unique default hookd.uuid7(),
  tenant text not null default 'default' check (tenant <> '' and length(tenant) <= 255),
  url text not null,
  host text not null,
  types text[] not null default array['*'],
  filter jsonpath,
  format text check (format in ('standard', 'raw', 'cloudevents', 'thin')),
  ordered boolean not null default false,
  rate double precision check (rate > 0 and rate < 'Infinity'),
  concurrency integer check (concurrency > 0),
  description text,
  state text not null default 'active' check (state in ('active', 'paused', 'disabled', 'removed')),
  state_reason text,
  state_at timestamptz not null default now(),
  failing_since timestamptz,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  former_shards smallint[] not null default '{}',
  xid xid8 not null default pg_current_xact_id()
);
create index endpoint_tenant on hookd.endpoint (tenant);
create index endpoint_shard on hookd.endpoint (shard);
create index endpoint_xid on hookd.endpoint (xid);

comment on table hookd.endpoint is 'A subscriber: a URL with its event types, filter and limits. It gets its own tenant''s events only';
comment on column hookd.endpoint.key is 'Narrow key, used by hookd.delivery and hookd.attempt; id is the public name';
comment on column hookd.endpoint.host is 'Lower-case A-label and port: the lane that it shares with others on the same host';
comment on column hookd.endpoint.types is 'Patterns: user.created, user.* (all below user), * (all)';
comment on column hookd.endpoint.filter is 'SQL/JSON path on the payload; an event matches when it finds something other than false or null';
comment on column hookd.endpoint.format is 'Null: as the daemon''s configuration says';
comment on column hookd.endpoint.state is 'active; paused: deliveries wait; disabled: gets none; removed: kept for the log until retention';
comment on column hookd.endpoint.failing_since is 'First failure since the last success';
comment on column hookd.endpoint.former_shards is 'Shards where deliveries inserted before it moved to another host may still be';
comment on column hookd.endpoint.xid is 'Transaction of the last change: daemons read changes by snapshot difference';

create table hookd.endpoint_secret (
  id bigint primary key generated always as identity,
  endpoint integer not null references hookd.endpoint (key) on delete cascade,
  purpose text not null check (purpose in ('signing', 'headers')),
  value text not null,
  created_at timestamptz not null default now(),
  expires_at timestamptz
);
create index endpoint_secret_endpoint on hookd.endpoint_secret (endpoint);
comment on table hookd.endpoint_secret is 'Signing secrets and headers of endpoints; neither producers nor readers may read it';
comment on column hookd.endpoint_secret.expires_at is 'A rotated secret signs until then';

create function hookd.endpoint_before() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  new.shard := hookd.shard_of(new.host);
  if tg_op = 'UPDATE' then
    if new.shard <> old.shard and not old.shard = any(new.former_shards) then
      new.former_shards := new.former_shards || old.shard;
    end if;
    if new.state <> old.state then
      new.state_at := clock_timestamp();
    end if;
    new.updated_at := clock_timestamp();
    new.xid := pg_current_xact_id();
  end if;
  return new;
end
$$;

create function hookd.endpoint_changed() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- endpoints change rarely: their owners are always told
  perform pg_notify('hookd', 'endpoint');
  return null;
end
$$;

-- failing_since is the daemon's own note and tells nobody anything new
create trigger endpoint_before_insert before insert on hookd.endpoint
  for each row execute function hookd.endpoint_before();
create trigger endpoint_before_update
  before update of tenant, url, host, types, filter, format, ordered, rate, concurrency, state, state_reason, updated_at
  on hookd.endpoint for each row execute function hookd.endpoint_before();
create trigger endpoint_changed
  after insert or update of tenant, url, host, types, filter, format, ordered, rate, concurrency, state, state_reason, updated_at
  on hookd.endpoint for each statement execute function hookd.endpoint_changed();

-- Events --------------------------------------------------------------------------------------------------------

create sequence hookd.event_key;

create table hookd.event (
  id uuid not null default hookd.uuid7() primary key,
  key bigint not null default nextval('hookd.event_key'),
  created_at timestamptz not null default clock_timestamp(),
  deliver_at timestamptz,
  expires_at timestamptz,
  type text not null,
  tenant text not null default 'default',
  payload text not null,
  idempotency_key text,
  order_key text,
  coalesce_key text,
  headers jsonb
) partition by range (id);
comment on table hookd.event is 'What happened: written once, never changed. Partitioned by day of its id (a uuid of version 7)';
comment on column hookd.event.id is 'The webhook-id header, the same at every endpoint and over retries and replays';
comment on column hookd.event.key is 'Ascends in the order of insertion';
comment on column hookd.event.payload is 'JSON; its bytes are kept and sent as they were given';
comment on column hookd.event.deliver_at is 'Not before then';
comment on column hookd.event.expires_at is 'Not after then';
comment on column hookd.event.order_key is 'Events of one key reach an endpoint in order';
comment on column hookd.event.coalesce_key is 'A newer event replaces older ones of the key that no attempt was made for';
comment on column hookd.event.headers is 'Sent along as HTTP headers, for instance {"traceparent": "…"}';

create table hookd.idempotency (
  tenant text not null,
  key text not null,
  event_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (tenant, key)
);
create index idempotency_created_at on hookd.idempotency (created_at);
comment on table hookd.idempotency is 'Keys already used, with the event that they stand for; kept as long as retention.events';

-- The queue and the log -------------------------------------------------------------------------------------------

create sequence hookd.delivery_id;

-- Narrow on purpose: a row lives for milliseconds. No foreign keys: a deleted endpoint must never fail a producer,
-- and only the owner of a row's shard updates or deletes it.
create table hookd.delivery (
  id bigint not null default nextval('hookd.delivery_id'),
  event_id uuid not null,
  xid xid8 not null default pg_current_xact_id(),
  due_at timestamptz,
  endpoint integer not null,
  shard smallint not null,
  attempt smallint not null default 0,
  replay boolean not null default false,
  order_key text,
  coalesce_key text,
  primary key (event_id, id)
) with (
  -- a settled row is a dead one: vacuum by count, not by share, and at full speed
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000,
  autovacuum_vacuum_insert_threshold = -1, autovacuum_vacuum_cost_delay = 0,
  autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000
);
create index delivery_xid on hookd.delivery (xid);
create index delivery_fresh on hookd.delivery (endpoint, id) where due_at is null;
create index delivery_due on hookd.delivery (endpoint, due_at, id) where due_at is not null;
create index delivery_ordered on hookd.delivery (endpoint, order_key, id) where order_key is not null;

comment on table hookd.delivery is 'The queue: one row for each event still owed to an endpoint. A settled row is deleted, hookd.attempt tells what became of it';
comment on column hookd.delivery.id is 'Ascends in the order of events';
comment on column hookd.delivery.xid is 'The inserting transaction: arrivals are read by snapshot difference';
comment on column hookd.delivery.due_at is 'Null: fresh, as soon as its host''s limits allow';
comment on column hookd.delivery.endpoint is 'hookd.endpoint.key';
comment on column hookd.delivery.attempt is 'Exchanges made so far';
comment on index hookd.delivery_xid is 'arrivals';
comment on index hookd.delivery_fresh is 'refill: an endpoint''s fresh rows from where its queue stopped reading';
comment on index hookd.delivery_due is 'refill and schedule: an endpoint''s rows by time';
comment on index hookd.delivery_ordered is 'heads and successors of order keys';

create table hookd.attempt (
  at timestamptz not null,
  delivery_id bigint not null,
  event_id uuid not null,
  endpoint integer not null,
  attempt smallint not null,
  status smallint,
  replay boolean not null default false,
  sent boolean not null default false,
  resent boolean not null default false,
  reused boolean not null default false,
  verdict text not null,
  outcome text,
  reason text,
  retry_at timestamptz,
  total_ms real,
  dns_ms real,
  connect_ms real,
  first_byte_ms real,
  url text,
  answer_headers text,
  answer_body text,
  answer_truncated boolean not null default false
) partition by range (at);
create index attempt_event on hookd.attempt (event_id, endpoint);
create index attempt_at on hookd.attempt (at);

comment on table hookd.attempt is 'The log: one row for each HTTP exchange, and one numbered 0 for an ending without an exchange. Append-only, partitioned by day';
comment on column hookd.attempt.at is 'When it began; also its webhook-timestamp, in whole seconds';
comment on column hookd.attempt.verdict is 'What followed: delivered, retry, hold (nobody''s attempt was used up), exhausted, expired, cancelled';
comment on column hookd.attempt.outcome is 'How the exchange ended: answered, timeout, connect_refused, …';
comment on column hookd.attempt.sent is 'Bytes of the request were written: the receiver may have acted on it';
comment on column hookd.attempt.resent is 'Sent twice, because a reused connection closed before any byte of an answer';
comment on column hookd.attempt.answer_body is 'Untrusted text from the receiver, bounded by delivery.max_response';

create table hookd.dead_letter (
  delivery_id bigint primary key,
  event_id uuid not null,
  endpoint integer not null,
  attempts smallint not null,
  died_at timestamptz not null default now(),
  replayed_at timestamptz,
  reason text not null,
  tenant text not null,
  type text not null,
  payload text not null,
  headers jsonb,
  created_at timestamptz not null,
  expires_at timestamptz
);
create index dead_letter_event on hookd.dead_letter (event_id);
create index dead_letter_endpoint on hookd.dead_letter (endpoint, died_at);
create index dead_letter_died_at on hookd.dead_letter (died_at);
comment on table hookd.dead_letter is 'Deliveries that were given up, with their event, for inspection and replay';

-- Daemons ---------------------------------------------------------------------------------------------------------

create unlogged table hookd.node (
  id text primary key,
  backend integer not null,
  started_at timestamptz not null,
  seen_at timestamptz not null,
  summary jsonb not null
) with (fillfactor = 50);
comment on table hookd.node is 'What each daemon says of itself and its lanes, every second; for hookd status, top and explain';
comment on column hookd.node.backend is 'Process id of its owner session in PostgreSQL';
