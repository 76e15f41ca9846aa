-- The TLS handshake apart from the connection: one of the two is nearly all of a slow attempt, and they have other causes.

alter table hookd.attempt add column tls_ms real;
comment on column hookd.attempt.tls_ms is 'The handshake; null without TLS, on a connection that was open, and in rows from before this column, whose connect_ms holds both';
