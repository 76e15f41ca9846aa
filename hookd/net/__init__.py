"""The network adapter: the only importer of aiohttp's client, aiodns and sockets."""
