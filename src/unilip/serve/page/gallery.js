// What was drawn, newest first, kept in the browser's own database; where it has none, until the page is closed.

const MOST = 500;
const urls = new WeakMap();

/** An address of a picture for this page. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

const asked = (request) => new Promise((done, failed) => {
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});

export class Gallery {
  entries = [];
  kept = true;
  last = 0;

  async open() {
    try {
      const request = indexedDB.open('unilip-studio', 1);
      request.onupgradeneeded = () => request.result.createObjectStore('pictures', {keyPath: 'id'});
      this.base = await asked(request);
      this.entries = (await asked(this.store('readonly').getAll())).sort((a, b) => b.id - a.id);
    } catch {
      this.kept = false;
    }
  }

  store(mode) {
    return this.base.transaction('pictures', mode).objectStore('pictures');
  }

  /** Add new entries, or ones that were taken out, in the order of their making. */
  async put(...entries) {
    for (const entry of entries) entry.id ??= this.last = Math.max(Date.now(), this.last + 1);
    this.entries = [...entries, ...this.entries].sort((a, b) => b.id - a.id);
    await this.write((store) => entries.forEach((entry) => store.put(entry)));
    if (this.entries.length > MOST) await this.take(...this.entries.slice(MOST));
  }

  async take(...entries) {
    this.entries = this.entries.filter((one) => !entries.includes(one));
    await this.write((store) => entries.forEach((entry) => store.delete(entry.id)));
  }

  async write(change) {
    try {
      const store = this.kept && this.store('readwrite');
      if (store) {
        change(store);
        await new Promise((done, failed) => {
          store.transaction.oncomplete = done;
          store.transaction.onabort = () => failed(store.transaction.error);
        });
      }
    } catch {
      this.kept = false;
    }
  }
}
