"""The console: server-rendered pages on ``[admin] listen``, which read the database and act like the API."""
