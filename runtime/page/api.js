// The server, as the page asks it. Addresses are relative, so a proxy may put a path before them.

const KEY = 'gentron.key'

export class ServerError extends Error {
  constructor(message, status = 0, field = null) {
    super(message)
    this.status = status
    this.field = field
  }
}

/** The browser's storage of that name; memory where it refuses. */
export function storage(name) {
  try {
    return window[name]
  } catch {
    const values = new Map()
    return {
      getItem: key => values.get(key) ?? null,
      setItem: (key, value) => values.set(key, value),
      removeItem: key => values.delete(key),
    }
  }
}

const session = storage('sessionStorage')

export function useKey(key) {
  session.setItem(KEY, key)
}

/** The answer, or a ServerError in the server's own words. */
export async function ask(path, {method = 'GET', body, signal} = {}) {
  const headers = {}
  if (body !== undefined) headers['Content-Type'] = 'application/json'
  const key = session.getItem(KEY)
  if (key) headers.Authorization = `Bearer ${key}`
  let response
  try {
    response = await fetch(path, {method, headers, body, signal})
  } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new ServerError('The server does not answer. Is gentron-serve still running?')
  }
  if (response.ok) return response
  throw await refusal(response)
}

async function refusal(response) {
  const text = await response.text()
  try {
    const {message, param} = JSON.parse(text).error
    return new ServerError(message, response.status, param)
  } catch {
    const words = `The server answered ${response.status} ${response.statusText}`.trim()
    return new ServerError(words, response.status)
  }
}

/** The body as JSON. A seed has up to 20 digits, more than a JavaScript number holds. */
export function written(request, own, seed) {
  const rest = JSON.stringify(own).slice(1, -1)
  const gentron = `{"seed":${seed}${rest && ','}${rest}}`
  return `${JSON.stringify(request).slice(0, -1)},"gentron":${gentron}}`
}

/** Steps as {step, total}, then partial pictures and the picture as {type, ...}. */
export async function* drawing(body, signal) {
  const response = await ask('v1/images/generations', {method: 'POST', body, signal})
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ''
  let whole = false
  try {
    for (;;) {
      const {value, done} = await reader.read()
      if (done) break
      text += value
      const blocks = text.split('\n\n')
      text = blocks.pop()
      for (const block of blocks) {
        const event = read(block)
        if (event?.type === 'error') throw new ServerError(event.error.message)
        if (event) yield event
        whole ||= event?.type === 'image_generation.completed'
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === 'AbortError') throw error
    throw new ServerError('The connection was lost before the picture was done.')
  }
  if (!whole) throw new ServerError('The server ended before the picture was done.')
}

function read(block) {
  const step = /^: step (\d+) of (\d+)/.exec(block)
  if (step) return {step: Number(step[1]), total: Number(step[2])}
  const kind = /^event: (.+)$/m.exec(block)?.[1]
  const data = /^data: (.+)$/m.exec(block)?.[1]
  return data ? {...JSON.parse(data), type: kind} : null
}

/** A video's states until it has ended; the last one is whole. */
export async function* filming(id, signal) {
  for (;;) {
    const job = await (await ask(`v1/videos/${id}`, {signal})).json()
    yield job
    if (job.status === 'completed') return
    if (job.status === 'failed') throw new ServerError(job.error?.message ?? 'The video failed.', 500)
    await new Promise(resolve => setTimeout(resolve, 250))
    signal.throwIfAborted()
  }
}

export function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], {type})
}
