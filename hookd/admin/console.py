"""
The console: one page that shows what ``hookd status`` shows, live.  It reads the API and changes nothing.

Script and style are files of their own, because the content security policy runs nothing that is inline.
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>hookd</title><link rel="stylesheet" href="/console.css"></head><body>
<h1>hookd <small>@VERSION@</small></h1><div id="error" role="status"></div>
<div class="tiles" id="tiles"></div>
<h2>Lanes</h2><div id="lanes"></div><h2>Latest attempts</h2><div id="attempts"></div><h2>Endpoints</h2><div id="endpoints"></div>
<script src="/console.js"></script></body></html>
"""

STYLE = """:root{color-scheme:light dark;--line:#8884;--dim:#888;--bad:#c33;--good:#2a7}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1.5rem}
h1{font-size:1.3rem;margin:0 0 1rem}h1 small{color:var(--dim);font-weight:400}h2{font-size:1rem;margin:2rem 0 .5rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem}
.tile{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .9rem}.tile b{display:block;font-size:1.5rem}
.tile span,td.dim,.empty{color:var(--dim)}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{color:var(--dim);font-weight:500}td.n{text-align:right}td.url{word-break:break-all}
.bad{color:var(--bad)}.good{color:var(--good)}#error{color:var(--bad);min-height:1.5em}
"""

SCRIPT = """const get = async path => { const r = await fetch('/api/v1' + path); const v = await r.json();
  if (!r.ok) throw new Error(v.detail || r.status); return v }
const cell = (text, kind) => { const td = document.createElement('td'); td.textContent = text ?? ''; if (kind) td.className = kind; return td }
const table = (id, head, rows, empty) => { const box = document.getElementById(id); box.replaceChildren()
  if (!rows.length) { const p = document.createElement('p'); p.className = 'empty'; p.textContent = empty; box.append(p); return }
  const t = document.createElement('table'), h = t.insertRow()
  for (const name of head) { const th = document.createElement('th'); th.textContent = name; h.append(th) }
  for (const row of rows) { const tr = t.insertRow(); for (const [text, kind] of row) tr.append(cell(text, kind)) }
  box.append(t) }
const much = n => n > 10000 ? '10,000+' : n.toLocaleString('en')
const draw = async () => { try {
  const [now, attempts, endpoints] = await Promise.all([get('/status'), get('/attempts?limit=15'), get('/endpoints?limit=50')])
  const q = now.queue, sum = name => now.daemons.reduce((n, d) => n + d.summary[name], 0)
  const tiles = [['daemons', now.daemons.length], ['in flight', sum('in_flight')], ['fresh', much(q.fresh)],
    ['due later', much(q.waiting)], ['dead letters', much(q.dead_letters)], ['endpoints failing', q.failing]]
  document.getElementById('tiles').replaceChildren(...tiles.map(([name, value]) => { const d = document.createElement('div')
    d.className = 'tile'; const b = document.createElement('b'), s = document.createElement('span')
    b.textContent = value; s.textContent = name; d.append(b, s); return d }))
  table('lanes', ['host', 'in flight', 'limit', 'waits for', 'in memory', 'in queue', 'last error'], now.lanes
    .map(l => [[l.host, l.breaker_open || l.held_s > 0 ? 'bad' : ''], [l.in_flight, 'n'], [`${l.concurrency}/${l.cap || '-'}`, 'n'],
    [l.held_s >= 1 ? `${l.why} ${Math.floor(l.held_s)} s` : l.why], [l.waiting, 'n'], [l.queued + (l.queued_more ? '+' : ''), 'n'],
    [l.problem && `${Math.floor(l.problem_s)} s ago: ${l.problem}`, 'dim']]), 'nothing waits')
  table('attempts', ['at', 'verdict', 'answer', 'ms', 'url', 'reason'], attempts.data.map(a => [[a.at.slice(11, 19), 'dim'],
    [a.verdict, a.verdict == 'delivered' ? 'good' : 'bad'], [a.status ?? a.outcome], [a.total_ms == null ? '' : a.total_ms.toFixed(1), 'n'],
    [a.url, 'url'], [a.reason, 'dim']]), 'none yet: send an event')
  table('endpoints', ['state', 'tenant', 'types', 'url'], endpoints.data.map(e => [[e.state, e.state == 'active' ? 'good' : 'bad'],
    [e.tenant], [e.types.join(', ')], [e.url, 'url']]), 'none yet: hookd endpoint add URL')
  document.getElementById('error').textContent = '' } catch (e) { document.getElementById('error').textContent = String(e.message || e) } }
draw(); setInterval(draw, 2000)
"""
