"""
PostgreSQL's health, as far as a queue in it depends on it: what holds vacuum back, dead rows, locks' and listeners' backlog, days.

One look is four statements of a millisecond or two each; the daemon takes one every ``upkeep.EXAMINE_S``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookd.core.database import DatabaseHealth, Holder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Who keeps the oldest row versions of this database alive.  Since PostgreSQL 14 a session holds back only its own database's
# tables, so others are left out; standbys and slots hold back all of them.  Vacuum itself is not counted by vacuum.
# A session of another role shows neither its snapshot nor what it does, except to pg_read_all_stats.
HOLDING = """
select holder, pid, transactions, seconds, who
  from (
    select case when a.backend_type = 'walsender' then 'standby' else 'session' end as holder, a.pid,
           greatest(age(a.backend_xmin), age(a.backend_xid)) as transactions,
           extract(epoch from clock_timestamp() - a.xact_start)::double precision as seconds,
           concat_ws(', ', 'process ' || a.pid, a.usename, nullif(a.application_name, ''), host(a.client_addr), a.state) as who
      from pg_stat_activity a
     where (a.backend_xmin is not null or a.backend_xid is not null) and a.pid <> pg_backend_pid()
       and a.backend_type not in ('autovacuum worker', 'autovacuum launcher')
       and (a.datid = (select oid from pg_database where datname = current_database()) or a.backend_type = 'walsender')
    union all
    select 'prepared_transaction', null, age(p.transaction),
           extract(epoch from clock_timestamp() - p.prepared)::double precision,
           concat_ws(', ', 'prepared transaction ' || quote_literal(p.gid), p.owner)
      from pg_prepared_xacts p where p.database = current_database()
    union all
    select 'replication_slot', s.active_pid, age(s.xmin), null,
           concat_ws(', ', 'replication slot ' || quote_ident(s.slot_name), case when s.active then 'active' else 'not in use' end)
      from pg_replication_slots s where s.xmin is not null) h
 order by transactions desc nulls last
"""

SESSIONS = """
select pg_has_role(current_user, 'pg_read_all_stats', 'usage') as visible,
       pg_notification_queue_usage() as notify_usage,
       (select concat_ws(', ', 'process ' || a.pid, a.usename, nullif(a.application_name, ''), host(a.client_addr), a.state)
          from pg_stat_activity a
         where a.datname = current_database() and a.pid <> pg_backend_pid() and a.xact_start is not null
           and a.backend_type = 'client backend'
         order by a.xact_start limit 1) as longest_who,
       coalesce((select extract(epoch from clock_timestamp() - min(a.xact_start))
          from pg_stat_activity a
         where a.datname = current_database() and a.pid <> pg_backend_pid()
           and a.backend_type = 'client backend'), 0)::double precision as longest_s
"""

TABLE = """
select pg_stat_get_live_tuples(c.oid) as live, pg_stat_get_dead_tuples(c.oid) as dead, pg_total_relation_size(c.oid) as bytes,
       extract(epoch from clock_timestamp() - greatest(
         pg_stat_get_last_autovacuum_time(c.oid), pg_stat_get_last_vacuum_time(c.oid)))::double precision as vacuumed_s
  from pg_class c where c.oid = 'hookd.delivery'::regclass
"""

# Days that are made ahead, and for how long what retention ends has been due to go: a day is dropped whole.
DAYS = """
select p.parent,
       (max(p.first_day) filter (where p.before_day is null) - (now() at time zone 'utc')::date) as ahead,
       greatest(0, extract(epoch from clock_timestamp() - min(p.before_day)::timestamp at time zone 'utc')
                   - case p.parent when 'event' then $1::double precision else $2::double precision end)::double precision as behind_s
  from hookd.partition p group by p.parent
union all
select 'dead_letter', null,
       greatest(0, extract(epoch from clock_timestamp() - (select min(died_at) from hookd.dead_letter)) - $3::double precision)::double precision
"""


async def examine(
    fetch: Callable[..., Awaitable[Any]], *, events_s: float, attempts_s: float, dead_letters_s: float
) -> DatabaseHealth:
    """Look; ``fetch`` runs a statement and returns its rows.  The others are the retentions."""
    holders: dict[str, Holder] = {}
    for row in await fetch(HOLDING):
        holders.setdefault(
            row["holder"], Holder(row["holder"], row["transactions"] or 0, row["seconds"], row["who"])
        )
    (sessions,) = await fetch(SESSIONS)
    (table,) = await fetch(TABLE)
    days = await fetch(DAYS, float(events_s), float(attempts_s), float(dead_letters_s))
    return DatabaseHealth(
        holders=tuple(holders.values()),
        visible=sessions["visible"],
        longest_transaction_s=sessions["longest_s"],
        longest_who=sessions["longest_who"],
        notify_usage=sessions["notify_usage"],
        dead_rows=table["dead"],
        live_rows=table["live"],
        queue_bytes=table["bytes"],
        vacuumed_s=table["vacuumed_s"],
        ahead={r["parent"]: r["ahead"] for r in days if r["ahead"] is not None},
        behind_s={r["parent"]: r["behind_s"] or 0.0 for r in days},
    )
