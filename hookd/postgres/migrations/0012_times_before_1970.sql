-- What was before 1970, or beyond what 48 bits of milliseconds hold, is not the contrary of what was asked for: a replay until
-- 1900 took all events, one since the year 1 (which some clients send for "no time") failed.  Both are the nearest that an id can say.

create or replace function hookd.uuid7_floor(at timestamptz) returns uuid
language sql immutable parallel safe
as $$
  select (encode(substring(int8send((extract(epoch from
            case when at < '1970-01-01 00:00:00+00' then '1970-01-01 00:00:00+00'
                 when at > '9000-01-01 00:00:00+00' then '9000-01-01 00:00:00+00'
                 else at end) * 1000)::bigint) from 3), 'hex') || repeat('0', 20))::uuid
$$;
