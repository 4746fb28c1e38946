// The table: tiles on which pictures appear, the scale of steps, and one thing with its settings.

const frames = document.querySelector('#frames')
const scale = document.querySelector('#scale')
const status = document.querySelector('#status')
const count = document.querySelector('#count')
const details = document.querySelector('#details')
const still = matchMedia('(prefers-reduced-motion: reduce)')

export class Stage {
  constructor() {
    this.tiles = []
    this.steps = []
    this.total = 0
    this.urls = []
    this.shown = null // the entry whose file is on the table
  }

  /** Noise where pictures will be, of `width` x `height`; `seeds` say which. */
  begin(seeds, [width, height], total) {
    this.clear(seeds.length)
    for (const seed of seeds) {
      const tile = document.createElement('div')
      tile.className = 'tile'
      tile.style.aspectRatio = `${width} / ${height}`
      tile.append(noise(Number(BigInt(seed) % 4294967291n), width, height))
      frames.append(tile)
      this.tiles.push(tile)
    }
    this.steps = seeds.map(() => 0)
    this.total = total
    scale.replaceChildren(...Array.from({length: total}, () => document.createElement('i')))
    scale.setAttribute('aria-valuemax', total)
    this.progress(0, 0)
  }

  running(yes) {
    frames.classList.toggle('running', yes)
    frames.setAttribute('aria-busy', yes)
    if (yes) return
    count.textContent = ''
    for (const tick of scale.children) tick.classList.remove('head')
    scale.setAttribute('aria-valuetext', 'nothing is being made')
  }

  /** Of several, the scale shows how far the slowest is. */
  progress(tile, step) {
    this.steps[tile] = step
    const slowest = Math.min(...this.steps)
    for (const [k, tick] of [...scale.children].entries()) {
      tick.classList.toggle('done', k < slowest)
      tick.classList.toggle('head', k === slowest)
    }
    scale.setAttribute('aria-valuenow', slowest)
    const words = slowest ? `step ${slowest} of ${this.total}` : 'waiting for the first step'
    scale.setAttribute('aria-valuetext', words)
    count.textContent = words
  }

  /** A picture, unfinished or not, over what the tile showed. */
  async picture(tile, blob, alt) {
    const image = new Image()
    image.alt = alt
    image.src = this.url(blob)
    await image.decode()
    this.tiles[tile]?.replaceChildren(image)
  }

  film(tile, blob, label) {
    const video = document.createElement('video')
    Object.assign(video, {src: this.url(blob), controls: true, loop: true, muted: true, playsInline: true})
    video.setAttribute('aria-label', label)
    video.autoplay = !still.matches
    this.tiles[tile].replaceChildren(video)
  }

  url(blob) {
    const url = URL.createObjectURL(blob)
    this.urls.push(url)
    return url
  }

  clear(number) {
    for (const url of this.urls) URL.revokeObjectURL(url)
    this.urls = []
    this.tiles = []
    this.shown = null
    frames.replaceChildren()
    frames.dataset.count = number
    scale.replaceChildren()
    details.hidden = true
  }

  /** One thing that was made, with what it takes to make it again. */
  async show(entry) {
    const {width, height, steps} = entry.settings
    if (this.shown !== entry) {
      this.begin([entry.settings.seed], [width, height], steps)
      this.progress(0, steps)
      this.running(false)
    }
    this.shown = entry
    describe(entry, this.url(entry.blob))
    if (entry.kind === 'video') this.film(0, entry.blob, `Video: ${entry.settings.prompt}`)
    else await this.picture(0, entry.blob, entry.settings.prompt)
  }
}

/** What happens, once and in words; steps are told by the scale. */
export function say(words) {
  status.textContent = words
}

function describe(entry, url) {
  const {prompt, negative, ...own} = entry.settings
  document.querySelector('#shown-prompt').textContent = prompt
  const facts = [
    ['Seed', own.seed], ['Size', `${own.width} × ${own.height}`], ['Steps', own.steps],
    ['Solver', own.solver], ['Guidance', own.guidance], ['Away from', negative],
    ['Frames', own.frames && `${own.frames} at ${own.fps} a second`], ['Motion', own.motion],
    ['Took', entry.seconds && `${entry.seconds.toFixed(1)} s`], ['Model', entry.model],
  ]
  document.querySelector('#facts').replaceChildren(...facts.filter(([, value]) => value).map(fact))
  document.querySelector('#warnings').textContent = (entry.warnings ?? []).join(' ')
  const download = document.querySelector('#download')
  download.href = url
  const words = prompt.toLowerCase().replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, '').slice(0, 60)
  download.download = `${words || 'picture'}-${own.seed}.${entry.kind === 'video' ? 'mp4' : 'png'}`
  details.hidden = false
}

function fact([name, value]) {
  const pair = document.createElement('div')
  const [term, definition] = ['dt', 'dd'].map(tag => document.createElement(tag))
  term.textContent = name
  definition.textContent = value
  pair.append(term, definition)
  return pair
}

/** Blocks as large as a latent's, in tints of the ground; the same for the same seed. */
function noise(seed, width, height) {
  const canvas = document.createElement('canvas')
  canvas.width = Math.max(1, Math.min(64, Math.round(width / 8)))
  canvas.height = Math.max(1, Math.min(64, Math.round(height / 8)))
  canvas.setAttribute('aria-hidden', 'true')
  const context = canvas.getContext('2d')
  let state = seed || 1
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
  const normal = () => (uniform() + uniform() + uniform() + uniform() - 2) * 1.7
  const dark = getComputedStyle(document.documentElement).colorScheme === 'dark'
    || (getComputedStyle(document.documentElement).colorScheme !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches)
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const light = (dark ? 22 : 89) + 3.5 * normal()
      context.fillStyle = `hsl(${360 * uniform()} ${(dark ? 12 : 26) + 6 * normal()}% ${light}%)`
      context.fillRect(x, y, 1, 1)
    }
  }
  return canvas
}
