// What was made, kept in this browser: IndexedDB, or memory where there is none, which is said.

const STORE = 'made'
let base = null
let unkept = 0 // how many are in memory alone
let numbers = 0

const done = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result)
  request.onerror = () => reject(request.error)
})

/** Everything that was kept, oldest first; `report` is told in words where things are. */
export async function open(report) {
  try {
    const request = indexedDB.open('gentron', 1)
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, {keyPath: 'id', autoIncrement: true})
    base = await done(request)
    const kept = await done(base.transaction(STORE).objectStore(STORE).getAll())
    report('Kept in this browser, with their settings, until you remove them.')
    return kept
  } catch (error) {
    base = null
    report(`This browser keeps nothing (${error.message}): download what you like before you close the page.`)
    return []
  }
}

/** Adds one and gives it its id. Where there is no room it stays in memory, and `report` is told. */
export async function keep(entry, report) {
  try {
    if (!base) throw new Error('it has no store')
    const transaction = base.transaction(STORE, 'readwrite')
    const whole = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve
      transaction.onabort = () => reject(transaction.error ?? new Error('it stopped'))
    })
    const id = await done(transaction.objectStore(STORE).add(entry))
    await whole
    entry.id = id
  } catch (error) {
    unkept += 1
    numbers += 1
    entry.id = `memory-${numbers}`
    report(`${unkept} of these are not kept by the browser (${error.message}): download them before you close the page.`)
  }
  return entry
}

export async function forget(entry) {
  if (typeof entry.id === 'string') unkept -= 1
  else await done(base.transaction(STORE, 'readwrite').objectStore(STORE).delete(entry.id))
}

// A page that is closed takes with it what is in memory alone.
addEventListener('beforeunload', event => {
  if (unkept) event.preventDefault()
})
