// The page: what happens when.

import {ServerError, ask, blobOf, drawing, filming, storage, useKey, written} from './api.js'
import * as form from './form.js'
import * as gallery from './gallery.js'
import {Stage, say} from './stage.js'

const $ = selector => document.querySelector(selector)
const kept = storage('localStorage')
const stage = new Stage()
const entries = new Map()
const narrow = matchMedia('(max-width: 820px)')
const JOB = 'gentron.job' // a video under way, found again after a reload
let model = null
let able = null
let current = null // what is being made: an AbortController
let shown = null
let afterKey = null

// ---- making

async function make(values) {
  if (current) return
  form.clear()
  current = new AbortController()
  mark(null)
  if (narrow.matches) $('#settings').open = false // so that the table is in sight
  busy(true)
  try {
    if (values.kind === 'video') await film(values, current.signal)
    else await draw(values, current.signal)
  } catch (error) {
    if (current.signal.aborted) say('Cancelled.')
    else fail(error, () => make(values))
  } finally {
    current = null
    busy(false)
  }
}

async function draw(values, signal) {
  const {n = 1, prompt, negative, seed, width, height, steps, solver, guidance} = values
  const seeds = Array.from({length: n}, (_, k) => (BigInt(seed) + BigInt(k)).toString())
  stage.begin(seeds, [width, height], counted(steps))
  say(n === 1 ? 'Drawing' : `Drawing ${n} pictures`)
  const request = {prompt, size: `${width}x${height}`, stream: true}
  const own = {steps, solver, guidance, negative, previews: Math.max(0, Math.min(able.limits.previews, Math.floor(steps) - 1))}
  const one = async (own_seed, k) => {
    for await (const event of drawing(written(request, own, own_seed), signal)) {
      if (event.step) stage.progress(k, event.step)
      else if (event.type === 'image_generation.partial_image') {
        await stage.picture(k, blobOf(event.b64_json, 'image/png'), `Not done yet: ${prompt}`)
      } else if (event.type === 'image_generation.completed') {
        const blob = blobOf(event.b64_json, 'image/png')
        await stage.picture(k, blob, prompt)
        const {seconds, warnings} = event.gentron
        const settings = {prompt, negative, seed: own_seed, width, height, steps, solver, guidance}
        return add({kind: 'picture', blob, settings, seconds: total(seconds), warnings, model})
      }
    }
  }
  const ended = await Promise.allSettled(seeds.map(one))
  const made = ended.filter(end => end.status === 'fulfilled').map(end => end.value)
  const failed = ended.find(end => end.status === 'rejected')
  if (failed) throw failed.reason
  if (n === 1) {
    stage.shown = made[0]
    await select(made[0])
  }
  say(n === 1 ? 'Done.' : `Done: ${n} pictures. Choose one below to see its settings.`)
}

/** Ticks of the scale, for what the server may yet refuse. */
const counted = steps => Math.max(1, Math.min(able.limits.steps, Math.floor(steps)))
const total = seconds => Object.values(seconds ?? {}).reduce((sum, value) => sum + value, 0)

async function film(values, signal) {
  const {prompt, negative, seed, width, height, steps, solver, guidance, motion, frames, fps} = values
  const own = {steps, solver, guidance, motion, frames, fps, negative}
  const body = written({prompt, size: `${width}x${height}`}, own, seed)
  const job = await (await ask('v1/videos', {method: 'POST', body})).json()
  kept.setItem(JOB, JSON.stringify({id: job.id, values}))
  await follow(job.id, values, signal)
}

/** A job until its video is here. Cancelling deletes it on the server. */
async function follow(id, values, signal) {
  const started = performance.now()
  stage.begin([values.seed], [values.width, values.height], counted(values.steps))
  say('Filming')
  try {
    for await (const job of filming(id, signal)) stage.progress(0, job.gentron.done_steps)
    const blob = await (await ask(`v1/videos/${id}/content`, {signal})).blob()
    const {kind, n, ...settings} = values
    const seconds = (performance.now() - started) / 1000
    await select(await add({kind: 'video', blob, settings, seconds, warnings: [], model}))
    say('Done.')
  } catch (error) {
    if (signal.aborted) await ask(`v1/videos/${id}`, {method: 'DELETE'})
    else if (error.status === 401 || error.status === 0) throw error // it may still be there
    kept.removeItem(JOB)
    throw error
  }
  kept.removeItem(JOB)
}

async function resume() {
  const job = JSON.parse(kept.getItem(JOB) ?? 'null')
  if (!job || current) return
  current = new AbortController()
  busy(true)
  try {
    await follow(job.id, job.values, current.signal)
  } catch (error) {
    if (current.signal.aborted) say('Cancelled.')
    else fail(error, resume)
  } finally {
    current = null
    busy(false)
  }
}

function cancel() {
  current?.abort()
}

function busy(yes) {
  const [draw, stop] = [$('#draw'), $('#cancel')]
  const focused = document.activeElement
  draw.hidden = yes
  stop.hidden = !yes
  $('#again').disabled = yes
  $('#shortcut').replaceChildren(...shortcut(yes))
  if (focused === draw || focused === $('#again')) stop.focus()
  if (focused === stop) draw.focus()
  stage.running(yes)
}

function shortcut(yes) {
  const key = document.createElement('kbd')
  key.textContent = yes ? 'Esc' : 'Enter'
  return [key, yes ? ' cancels' : ' draws']
}

function fail(error, again) {
  say(error instanceof ServerError ? 'Not made.' : '')
  if (error.status === 401) return askForKey(error, again)
  if (!(error instanceof ServerError)) console.error(error)
  form.complain(error)
}

// ---- what was made

async function add(entry) {
  entry.created = Date.now()
  await gallery.keep(entry, words => { $('#kept').textContent = words })
  list(entry)
  return entry
}

function list(entry) {
  const item = document.createElement('li')
  const button = document.createElement('button')
  button.type = 'button'
  const thumb = document.createElement('span')
  thumb.className = entry.kind === 'video' ? 'thumb film' : 'thumb'
  const inner = document.createElement(entry.kind === 'video' ? 'video' : 'img')
  const url = URL.createObjectURL(entry.blob)
  inner.src = entry.kind === 'video' ? `${url}#t=0.01` : url // a video shows nothing until it is moved
  if (entry.kind === 'video') Object.assign(inner, {muted: true, preload: 'auto', tabIndex: -1})
  else inner.alt = ''
  thumb.append(inner)
  const [caption, seed] = ['caption', 'seed'].map(name => {
    const line = document.createElement('span')
    line.className = name
    return line
  })
  caption.textContent = entry.settings.prompt
  seed.textContent = `${entry.kind === 'video' ? 'video, ' : ''}seed ${entry.settings.seed}`
  button.append(thumb, caption, seed)
  button.addEventListener('click', () => {
    if (current) say('That can be looked at when this is done.')
    else select(entry, true)
  })
  item.append(button)
  $('#gallery').prepend(item)
  entries.set(entry, {item, button, url})
  title()
}

function title() {
  $('#made-title').textContent = entries.size ? `Made here (${entries.size})` : 'Nothing made here yet'
}

/** The one of the gallery that is on the table, or none. */
function mark(entry) {
  shown = entry
  for (const [one, {button}] of entries) {
    if (one === entry) button.setAttribute('aria-current', 'true')
    else button.removeAttribute('aria-current')
  }
}

async function select(entry, scroll = false) {
  mark(entry)
  await stage.show(entry)
  if (scroll) $('.stage').scrollIntoView({block: 'nearest'})
}

async function remove(entry) {
  await gallery.forget(entry)
  const {item, url} = entries.get(entry)
  const next = item.nextElementSibling ?? item.previousElementSibling
  item.remove()
  URL.revokeObjectURL(url)
  entries.delete(entry)
  title()
  idle()
  const note = $('#removed')
  note.hidden = false
  note.querySelector('span').textContent = `Removed “${entry.settings.prompt.slice(0, 60)}”.`
  $('#undo').onclick = async () => {
    note.hidden = true
    const {id, ...rest} = entry
    await gallery.keep(Object.assign(rest), words => { $('#kept').textContent = words })
    list(rest)
    await select(rest)
  }
  ;(next?.querySelector('button') ?? $('#prompt')).focus()
}

function idle() {
  shown = null
  stage.begin(['20231204'], able?.size ?? [128, 128], able?.defaults.steps ?? 1)
  stage.running(false)
  say('Pictures appear here, step by step.')
}

// ---- the rest of the page

function askForKey(error, again) {
  $('#key-error').textContent = afterKey ? error.message : ''
  afterKey = again
  $('#key-form').hidden = false
  $('#key').focus()
}

$('#key-form').addEventListener('submit', event => {
  event.preventDefault()
  useKey($('#key').value.trim())
  $('#key').value = ''
  $('#key-form').hidden = true
  $('#prompt').focus()
  afterKey()
})

$('#form').addEventListener('submit', event => {
  event.preventDefault()
  try {
    make(form.wanted())
  } catch (error) {
    form.complain(error)
  }
})
$('#form').addEventListener('change', form.showKind)
$('#prompt').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
  event.preventDefault()
  $('#form').requestSubmit()
})
document.addEventListener('keydown', event => { if (event.key === 'Escape') cancel() })
$('#cancel').addEventListener('click', cancel)
$('#surprise').addEventListener('click', form.surprise)
$('#defaults').addEventListener('click', form.defaults)
$('#again').addEventListener('click', () => {
  const values = {...shown.settings, kind: shown.kind}
  if (shown.kind === 'picture') values.n = 1
  form.fill(values)
  make(values)
})
$('#remove').addEventListener('click', () => remove(shown))

const THEMES = {auto: 'system', light: 'light', dark: 'dark'}

function theme(name) {
  document.documentElement.dataset.theme = name
  $('#theme').textContent = `Theme: ${THEMES[name]}`
  kept.setItem('gentron.theme', name)
}

$('#theme').addEventListener('click', () => {
  const names = Object.keys(THEMES)
  theme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length])
  if (!current && !shown) idle()
})

async function start() {
  try {
    const {data} = await (await ask('v1/models')).json()
    model = data[0].id
    able = data[0].gentron
  } catch (error) {
    return fail(error, start)
  }
  $('#model').textContent = able.weights === 'random' ? `${model}: random weights, it draws noise` : model
  form.prepare(able)
  $('#draw').disabled = false
  if (!shown && !current) idle()
  resume()
}

theme(kept.getItem('gentron.theme') in THEMES ? kept.getItem('gentron.theme') : 'auto')
$('#draw').disabled = true
$('#settings').open = !narrow.matches
idle()
title()
for (const entry of await gallery.open(words => { $('#kept').textContent = words })) list(entry)
await start()
document.documentElement.dataset.ready = 'true'
