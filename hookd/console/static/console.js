// What pages gain with JavaScript: nothing here is needed to read or to act.
// Rows come from the server as escaped HTML and are parsed inertly; text goes in as text.
'use strict'
const all = (selector, root = document) => [...root.querySelectorAll(selector)]
const one = (selector, root = document) => root.querySelector(selector)
const parsed = html => new DOMParser().parseFromString(html, 'text/html')
const typing = () => document.activeElement?.matches('input, select, textarea')
const busy = () => document.hidden || typing() || one('details.menu[open], dialog[open]') || String(getSelection())

document.documentElement.classList.add('js')

// Theme: a cookie, so that the server writes it into the next page and nothing flashes.
one('#theme')?.removeAttribute('hidden')
one('#theme')?.addEventListener('click', event => {
  const next = { '': 'dark', dark: 'light', light: '' }[document.documentElement.dataset.theme || '']
  if (next) document.documentElement.dataset.theme = next
  else delete document.documentElement.dataset.theme
  document.cookie = `hookd_theme=${next}; path=/; samesite=strict; max-age=${next ? 31536000 : 0}`
  event.currentTarget.textContent = `Theme: ${next || 'system'}`
})

// Copying, also over plain HTTP, where there is no clipboard API.
const copied = async text => {
  if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text)
  const area = document.createElement('textarea')
  area.value = text
  document.body.append(area)
  area.select()
  document.execCommand('copy')
  area.remove()
}
document.addEventListener('click', async event => {
  const button = event.target.closest('button[data-copy]')
  if (!button) return
  const said = button.textContent
  await copied(one(button.dataset.copy).textContent)
  button.textContent = 'Copied'
  setTimeout(() => { button.textContent = said }, 1500)
})

// A row is a link; a click into it opens it, unless it selects text or hits something of its own.
document.addEventListener('click', event => {
  const row = event.target.closest('tr[data-href]')
  if (row && !event.target.closest('a, button, input, label, summary') && !String(getSelection())) location = row.dataset.href
})
document.addEventListener('click', event => {
  for (const menu of all('details.menu[open]')) if (!menu.contains(event.target)) menu.open = false
})

// What a chart says under the pointer.
document.addEventListener('pointerover', event => {
  const figure = event.target.closest?.('figure.chart')
  if (figure) one('output', figure).textContent = event.target.closest('.hit')?.dataset.say || ''
})

// Keys
const go = { o: '/', n: '/endpoints', v: '/events', d: '/deliveries', x: '/dead-letters', l: '/live', a: '/audit' }
let pending = ''
const rows = () => all('main tbody tr[data-href]').filter(row => row.offsetParent)
const move = step => {
  const list = rows()
  if (!list.length) return
  const now = list.findIndex(row => row.classList.contains('at'))
  const next = list[Math.max(0, Math.min(list.length - 1, now < 0 ? (step > 0 ? 0 : list.length - 1) : now + step))]
  list[now]?.classList.remove('at')
  next.classList.add('at')
  one('a', next)?.focus({ preventScroll: true })
  next.scrollIntoView({ block: 'nearest' })
}
const press = selector => { const found = one(selector); if (found) found.click(); return Boolean(found) }
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') {
    for (const menu of all('details.menu[open]')) { menu.open = false; one('summary', menu).focus() }
    if (typing()) document.activeElement.blur()
    return
  }
  if (event.ctrlKey || event.metaKey || event.altKey || typing() || one('dialog[open]')) return
  const key = event.key
  if (pending === 'g') {
    pending = ''
    if (go[key]) { event.preventDefault(); location = go[key] }
    return
  }
  const done = {
    g: () => { pending = 'g'; setTimeout(() => { pending = '' }, 1500) },
    '/': () => one('.find input').focus(),
    '?': () => one('#keys').showModal(),
    j: () => move(1),
    k: () => move(-1),
    r: () => press('[data-key="r"]'),
    '[': () => press('[rel="prev"]'),
    ']': () => press('[rel="next"]'),
  }[key]
  if (done) { event.preventDefault(); done() }
})
for (const button of all('[data-keys]')) {
  button.hidden = false
  button.addEventListener('click', () => one('#keys').showModal())
}

// Pages that renew themselves, while they are looked at and nothing in them is.
const renewing = one('main[data-renew]')
if (renewing) {
  const renew = async () => {
    if (busy() || renewing.contains(document.activeElement) || one('main details[open]')) return
    try {
      const answer = await fetch(location.href)
      if (!answer.ok) throw new Error(String(answer.status))
      const fresh = one('main', parsed(await answer.text()))
      one('#renewed', renewing).replaceWith(document.adoptNode(one('#renewed', fresh)))
      document.body.classList.remove('stale')
      one('#renew-state').className = 'live on'
      one('#renew-state').textContent = 'Live'
    } catch {
      one('#renew-state').className = 'live off'
      one('#renew-state').textContent = 'Not reachable; trying again'
    }
  }
  one('#renew-state').className = 'live on'
  one('#renew-state').textContent = 'Live'
  setInterval(renew, 1000 * Number(renewing.dataset.renew))
}

// Live tail: the server sends rows of the same template; the list is bounded.
const tail = one('[data-stream]')
if (tail) {
  const state = one('#stream-state'), button = one('#stream-button'), body = one('tbody', tail), most = 200
  let source = null, held = [], wanted = true
  const say = (kind, text) => { state.className = `live ${kind}`; state.textContent = text }
  const show = html => {
    const fresh = all('tr', parsed(`<table>${html}</table>`))
    for (const row of fresh) {
      if (row.id && document.getElementById(row.id)) continue
      row.classList.add('fresh')
      body.prepend(document.adoptNode(row))
    }
    while (body.rows.length > most) body.deleteRow(-1)
    if (body.rows.length) { one('#stream-empty')?.remove(); tail.hidden = false }
  }
  const stop = () => { source?.close(); source = null }
  const start = () => {
    stop()
    source = new EventSource(tail.dataset.stream)
    source.onopen = () => say('on', 'Live')
    source.addEventListener('rows', event => {
      if (one('tr.at', body) || String(getSelection())) held.push(event.data)
      else { for (const html of held.splice(0)) show(html); show(event.data) }
      held = held.slice(-20)
      if (held.length) say('off', 'Held while you read: Escape goes on')
    })
    source.addEventListener('left-out', event => say('on', `Live; ${event.data}`))
    source.addEventListener('end', event => { stop(); say('off', event.data); if (wanted) setTimeout(() => { if (wanted && !source) start() }, 3000) })
    source.onerror = () => {
      if (source?.readyState === EventSource.CLOSED) { stop(); setTimeout(() => { if (wanted && !source && !document.hidden) start() }, 5000) }
      say('off', 'Not connected; trying again')
    }
  }
  const set = on => { wanted = on; button.textContent = on ? 'Pause' : 'Go on'; if (on) start(); else { stop(); say('off', 'Paused') } }
  button.hidden = false
  button.addEventListener('click', () => set(!wanted))
  document.addEventListener('visibilitychange', () => { if (wanted) { if (document.hidden) { stop(); say('off', 'Paused while hidden') } else start() } })
  document.addEventListener('keydown', event => {
    if (event.key !== 'Escape') return
    one('tr.at', body)?.classList.remove('at')
    for (const html of held.splice(0)) show(html)
    if (source) say('on', 'Live')
  })
  addEventListener('pagehide', stop)
  set(true)
}
