// The server's own API: JSON, forms, streams of events. Whoever has no key is asked for one.

const KEY = 'unilip-key';

export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let askKey = async () => null;
export const onKey = (ask) => { askKey = ask; };

export async function send(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? {Authorization: `Bearer ${key}`} : {};
    const form = body instanceof FormData;
    if (body && !form) headers['Content-Type'] = 'application/json';
    let answer;
    try {
      answer = await fetch(path, {
        method: body ? 'POST' : 'GET', headers, signal, body: body && !form ? JSON.stringify(body) : body,
      });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new Refused('The server does not answer; see whether it still runs.');
    }
    if (answer.ok) return answer;
    const said = (await answer.json().catch(() => ({}))).error;
    if (answer.status !== 401) throw new Refused(said?.message ?? `The server answered ${answer.status}.`, answer.status);
    sessionStorage.removeItem(KEY);
    sessionStorage.setItem(KEY, await askKey(key ? 'That key was wrong.' : ''));
  }
}

export const json = async (path, body, signal) => (await send(path, body, signal)).json();

/** The objects of a stream of events, as they come. */
export async function* events(path, body, signal) {
  const reader = (await send(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = '', part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (text + part.value).split('\n\n');
    text = whole.pop();
    for (const line of whole.flatMap((event) => event.split('\n'))) {
      if (!line.startsWith('data: ') || line === 'data: [DONE]') continue;
      const found = JSON.parse(line.slice(6));
      if (found.error) throw new Refused(found.error.message);
      yield found;
    }
  }
}

export function toBlob(base64, type = 'image/png') {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], {type});
}

export function toURL(blob) {
  return new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
  });
}
