-- How an endpoint fares between its first failure and its end, and what a newer event of a coalesce key replaces.

alter table hookd.endpoint
  add column failing_reason text,
  add column parked_at timestamptz;
comment on column hookd.endpoint.failing_reason is 'The failure since failing_since, or the one that parked it';
comment on column hookd.endpoint.parked_at is 'Since then it gets one delivery now and then as a probe, and the others wait; null: it is not parked';

create index endpoint_host on hookd.endpoint (host);
comment on index hookd.endpoint_host is 'what is pending for a host, for status';

create index delivery_coalesced on hookd.delivery (endpoint, coalesce_key, id) where coalesce_key is not null;
comment on index hookd.delivery_coalesced is 'what is newer, and what is older, than a row of a coalesce key';

select hookd.grant_roles();
