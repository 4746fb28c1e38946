// The form: what the server can do, what the person asks for.

const form = document.querySelector('#form')
const field = name => form.elements[name]
const RANDOM = 2 ** 32
let able = null

/** Fills in what the bundle can do and its own settings. */
export function prepare(abilities) {
  able = abilities
  field('solver').replaceChildren(...able.solvers.map(name => new Option(name)))
  for (const name of ['width', 'height']) {
    Object.assign(field(name), {min: able.side.least, max: able.side.most, step: able.side.unit})
  }
  field('n').max = able.limits.n
  field('steps').max = able.limits.steps
  const video = able.video
  document.querySelector('#kinds').hidden = !video
  if (video) Object.assign(field('frames'), {max: video.most_frames})
  if (video) Object.assign(field('fps'), {max: video.most_fps})
  defaults()
  const surprise = document.querySelector('#surprise')
  surprise.hidden = !able.words.length
  field('prompt').placeholder = able.words.length ? withArticle(pick(able.words)) : 'a cat reading a newspaper'
}

/** The model's own settings; prompt and kind stay. */
export function defaults() {
  const {defaults, size, video} = able
  fill({...defaults, width: size[0], height: size[1], n: 1, negative: '', seed: '',
    frames: video?.frames ?? '', fps: video?.fps ?? ''})
}

export function fill(values) {
  for (const [name, value] of Object.entries(values)) {
    if (field(name) && value !== undefined) field(name).value = value
  }
  showKind()
}

export function kind() {
  return field('kind').value
}

/** Shows the fields of a picture or of a video. */
export function showKind() {
  const video = kind() === 'video'
  for (const cell of form.querySelectorAll('.for-video')) cell.hidden = !video
  for (const cell of form.querySelectorAll('.for-picture')) cell.hidden = video
  document.querySelector('#prompt-label').textContent = video ? 'Describe a video' : 'Describe a picture'
}

const pick = list => list[Math.floor(Math.random() * list.length)]
const withArticle = word => `${/^[aeiou]/i.test(word) ? 'an' : 'a'} ${word}`

/** One of the things that the model was shown, some on a colour, in motion for a video. */
export function surprise() {
  const colour = pick(['', '', ' on a blue background', ' on a yellow background', ' on a pink background'])
  const motion = kind() === 'video' ? pick([' moving right', ' moving left', ' growing']) : colour
  field('prompt').value = withArticle(pick(able.words)) + motion
  field('prompt').focus()
}

/** What is asked for, with the seed chosen; or throws a FieldError. */
export function wanted() {
  const names = ['steps', 'guidance', 'width', 'height']
  names.push(...(kind() === 'video' ? ['frames', 'motion', 'fps'] : ['n']))
  const values = {kind: kind(), prompt: field('prompt').value.trim(), solver: field('solver').value,
    negative: field('negative').value.trim()}
  if (!values.prompt) throw new FieldError('prompt', 'Say first what there is to see.')
  for (const name of names) {
    const input = field(name)
    if (input.validity.badInput || input.value === '') {
      throw new FieldError(name, `${name}: needs a number.`)
    }
    values[name] = Number(input.value)
  }
  const most = able.limits.n
  if (values.n !== undefined && !(Number.isInteger(values.n) && values.n >= 1 && values.n <= most)) {
    throw new FieldError('n', `n: between 1 and ${most} pictures at once.`)
  }
  values.seed = field('seed').value.trim() || String(crypto.getRandomValues(new Uint32Array(1))[0] % RANDOM)
  if (!/^\d{1,20}$/.test(values.seed)) {
    throw new FieldError('seed', 'seed: needs a whole number, or nothing for a random one.')
  }
  values.seed = BigInt(values.seed).toString()
  return values
}

export class FieldError extends Error {
  constructor(name, message) {
    super(message)
    this.field = name
  }
}

const error = document.querySelector('#error')

/** Says what is wrong, and marks the field that it is about. */
export function complain(problem) {
  clear()
  error.textContent = problem.message
  const name = {size: 'width', batch: 'n'}[problem.field] ?? problem.field?.replace(/^gentron\./, '')
  const input = name && field(name)
  if (!input?.setAttribute) return
  if (name !== 'prompt') document.querySelector('#settings').open = true
  input.setAttribute('aria-invalid', 'true')
  input.setAttribute('aria-describedby', 'error')
  input.focus()
}

export function clear() {
  error.textContent = ''
  for (const input of form.querySelectorAll('[aria-invalid]')) input.removeAttribute('aria-invalid')
}
