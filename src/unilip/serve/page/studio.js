// The page: a conversation over a composer, the gallery on the left, the settings on the right.

import {Refused, events, json, onKey, send, toBlob, toURL} from './api.js';
import {Gallery, urlOf} from './gallery.js';
import {take as takeToTrain, wireTraining} from './train.js';

const $ = (id) => document.getElementById(id);
const gallery = new Gallery();
const DOING = {generate: 'Draw', edit: 'Edit', ask: 'Ask', reconstruct: 'Reconstruct'};
const TAKEN = {generate: 'something to draw', edit: 'a change of the picture', ask: 'a question'};
const KINDS = ['image/png', 'image/jpeg', 'image/webp', 'image/gif'];
const OPEN = '(min-width:60.01rem)';
const SHAPES = ['1:1', '3:2', '2:3', '16:9', '9:16'];
const TOKEN = 28;  // the sides of a picture are multiples of it

let card = {abilities: [], sampling: {}, limits: {}, about: {}, image_size: 448};
let cards = [];  // the model, and the model with each of its adapters
let attached = [];  // pictures of the message being written
let current = null;  // the picture that the conversation is about
let said = [];  // what was asked and answered about it
let taken = {verb: 'generate', text: '', unread: []};  // how the words would be taken
let running = null;
let follow = true;  // keep the newest turn in sight, until the visitor scrolls

/** An element with properties and children; words become text, never markup. */
function make(name, properties = {}, ...children) {
  const {dataset, ...rest} = properties;
  const found = Object.assign(document.createElement(name), rest);
  Object.assign(found.dataset, dataset);
  found.append(...children.filter((child) => child !== null && child !== undefined && child !== ''));
  return found;
}

const button = (text, onclick, more = {}) => make('button', {type: 'button', textContent: text, onclick, ...more});

// --- pictures

/** Show a picture at the largest whole multiple of its size that has room. */
function fit(image, room) {
  if (!image.naturalWidth) return;
  const times = Math.floor(Math.min(room.width / image.naturalWidth, room.height / image.naturalHeight));
  const scale = times || Math.min(room.width / image.naturalWidth, room.height / image.naturalHeight);
  image.style.width = `${Math.round(image.naturalWidth * scale)}px`;
  image.classList.toggle('small', times > 1);
}

function roomOf(count = 1) {
  const talk = $('talk'), style = getComputedStyle(talk), narrow = innerWidth <= 44 * 16;
  const width = talk.clientWidth - parseFloat(style.paddingLeft) * 2 - (narrow ? 2 : 250);
  const height = talk.clientHeight - (narrow ? 190 : 34);
  const columns = count > 1 ? 2 : 1;
  return {width: (width - 8 * (columns - 1)) / columns, height: (height - 8 * (columns - 1)) / columns};
}

function refit() {
  for (const pictures of document.querySelectorAll('.turn:not(.ask) .pictures')) {
    const room = roomOf(pictures.childElementCount);
    for (const image of pictures.querySelectorAll('img')) fit(image, room);
    const wait = pictures.querySelector('.pending');
    if (wait) {
      const [width, height] = wait.dataset.size.split('x'), most = Math.min(room.width / width, room.height / height);
      const times = Math.floor(most) || most;
      wait.style.width = `${width * times}px`;
      wait.style.height = `${height * times}px`;
    }
  }
  if (follow) down();
  if ($('viewer').open) {
    const images = [...$('views').querySelectorAll('img')];
    const width = (Math.min(innerWidth, 1200) - 80) / (innerWidth > 700 ? images.length : 1);
    const height = (innerHeight - 330) / (innerWidth > 700 ? 1 : images.length);
    for (const image of images) fit(image, {width, height});
  }
}

function picture(blob, alt, onclick) {
  const image = make('img', {src: urlOf(blob), alt, onload: refit});
  if (!onclick) return make('figure', {}, image);
  const frame = button('', onclick, {ariaLabel: `Look at: ${alt}`});
  frame.append(image);
  return make('figure', {}, frame);
}

/** The width and height of a shape for a model of squares of `side`, as the server counts them. */
function sizeFor(shape, side) {
  const [a, b] = shape.split(':'), ratio = a / b, cells = (side / TOKEN) ** 2;
  let best = [1, 1], least = Infinity;
  for (let rows = 1; rows <= cells; rows++) {
    const most = Math.floor(cells / rows), near = Math.floor(rows * ratio);
    for (const columns of [Math.max(1, Math.min(most, near)), Math.min(most, near + 1)]) {
      const cost = Math.abs(Math.log(columns / rows / ratio)) + 0.5 * Math.log(cells / (rows * columns));
      if (cost < least) [best, least] = [[columns, rows], cost];
    }
  }
  return best.map((count) => count * TOKEN).join('x');
}

/** Offer the shapes that differ at the size that is set. */
function showShapes() {
  const side = Number($('values').elements.image_size.value) || card.image_size, seen = new Set();
  for (const chip of $('shapes').children) {
    const size = sizeFor(chip.textContent.trim(), side), field = chip.firstChild;
    chip.hidden = seen.has(size);
    if (chip.hidden && field.checked) $('shapes').querySelector('input').checked = true;
    chip.title = `${size.replace('x', ' × ')} px`;
    seen.add(size);
  }
  $('shapes').hidden = seen.size < 2 || verbNow() !== 'generate';
}

const nameOf = (entry) => {
  const words = entry.words.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-|-$/g, '').slice(0, 50);
  return `${words || entry.verb}${entry.seed === undefined ? '' : `-${entry.seed}`}.png`;
};

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** The command that makes an entry's picture again, for a POSIX shell; nothing for what the command line is not told here. */
function commandOf(entry) {
  const about = entry.settings, own = card.sampling, edit = entry.verb === 'edit';
  if (!about || about.model || edit && (!entry.source || about.image_size)) return '';
  const source = edit ? gallery.entries.find((one) => one.blob === entry.source) : null;
  const square = !about.image_size && (about.shape || '1:1') === '1:1';
  const options = {
    seed: entry.seed, preset: about.preset, steps: about.steps === own.num_inference_steps ? '' : about.steps,
    'guidance-scale': about.guidance === own.guidance_scale ? '' : about.guidance, solver: about.solver, 'negative-prompt': about.negative_prompt,
    size: edit || square ? '' : entry.size.replace(/[^\d×]/g, '').replace('×', 'x'), 'best-of': edit ? '' : about.best_of, fit: edit ? about.fit : '',
    plan: edit ? '' : {true: 'yes', false: 'no'}[about.plan],
  };
  const given = Object.entries(options).filter(([, value]) => value !== undefined && value !== '');
  const words = [...(edit ? [source ? nameOf(source) : 'before.png'] : []), entry.words];
  return ['unilip', entry.verb, ...given.map(([name, value]) => `--${name}=${/^[\w.+-]+$/.test(value) ? value : quoted(value)}`), '--', ...words.map(quoted)].join(' ');
}

/** Copy an entry's command, and show it, as a page that came over plain HTTP may not copy. */
async function copyCommand(entry) {
  const command = commandOf(entry);
  $('viewed').querySelector('code')?.remove();
  $('viewed').append(make('code', {textContent: command}));
  refit();
  await navigator.clipboard?.writeText(command).catch(() => {});
}

function download(entry) {
  make('a', {href: urlOf(entry.blob), download: nameOf(entry)}).click();
}

const sizeOf = (one) => `${one.size.replace('x', '\u00a0×\u00a0')}\u00a0px`;

function factsOf(entry) {
  const about = entry.settings ?? {};
  return [
    entry.seed === undefined ? '' : `seed ${entry.seed}`, about.preset || (about.steps ? `${about.steps} steps` : ''),
    about.best_of > 1 ? `best of ${about.best_of}` : '', about.guidance === undefined ? '' : `guidance ${about.guidance}`, entry.size ?? '',
    entry.psnr === undefined ? '' : `${entry.psnr.toFixed(1)} dB`, entry.seconds ? `${entry.seconds.toFixed(1)}\u00a0s` : '',
  ].filter(Boolean).join('\u00a0· ');
}

// --- the gallery, with its viewer

function showGallery() {
  $('thumbs').replaceChildren(...gallery.entries.map((entry) => {
    const image = make('img', {src: urlOf(entry.blob), alt: entry.words, loading: 'lazy', className: 'small'});
    return make('button', {type: 'button', title: entry.words, onclick: () => view(entry)}, image);
  }));
  $('clear').hidden = gallery.entries.length === 0;
  if (!gallery.kept) $('kept').textContent = 'This browser keeps nothing here: the pictures go when the page is closed.';
}

async function remove(...entries) {
  $('viewer').close();
  await gallery.take(...entries);
  showGallery();
  const what = entries.length === 1 ? 'The picture was deleted.' : `${entries.length} pictures were deleted.`;
  toast(what, 'Undo', async () => {
    await gallery.put(...entries);
    showGallery();
  });
}

function view(entry, other = null) {
  const both = other ? [other, entry] : [entry];
  $('viewed').replaceChildren(make('b', {textContent: entry.words}), make('span', {className: 'soft', textContent: factsOf(entry)}));
  $('views').replaceChildren(...both.map((one) => {
    const figure = picture(one.blob, one.words);
    if (other) figure.append(make('figcaption', {textContent: one.seed === undefined ? one.words : `${one.words} · seed ${one.seed}`}));
    return figure;
  }));
  const close = (then) => () => { $('viewer').close(); then(entry); };
  $('tools').replaceChildren(
    card.abilities.includes('edit') ? button('Edit this', close((one) => take(one.blob, 'edit'))) : '',
    card.abilities.includes('ask') ? button('Ask about it', close((one) => take(one.blob, 'ask'))) : '',
    entry.settings ? button('Use words and seed', close(reuse)) : '',
    commandOf(entry) ? button('Copy as command', () => copyCommand(entry), {title: 'What makes this picture again in a terminal'}) : '',
    button('Download', () => download(entry)),
    gallery.entries.includes(entry) ? button('Delete', () => remove(entry)) : '',
  );
  const source = entry.source ? [{blob: entry.source, words: 'before'}] : [];
  const others = [...source, ...gallery.entries.filter((one) => one !== entry && one.blob !== entry.source)];
  $('compare').hidden = others.length === 0;
  $('others').replaceChildren(...others.map((one) => {
    const same = other !== null && one.blob === other.blob;
    const image = make('img', {src: urlOf(one.blob), alt: '', loading: 'lazy', className: 'small'});
    const label = same ? 'Stop comparing' : `Compare with: ${one.words}`;
    const found = button('', () => view(entry, same ? null : one), {ariaLabel: label, title: label});
    found.setAttribute('aria-pressed', String(same));
    found.append(image);
    return found;
  }));
  if (!$('viewer').open) $('viewer').showModal();
  refit();
}

/** Take a picture of the gallery back: its words, seed and settings. */
function reuse(entry) {
  const form = $('values').elements;
  for (const [name, value] of Object.entries(entry.settings ?? {})) if (form[name]) form[name].value = value ?? '';
  showShapes();
  form.seed.value = entry.seed ?? '';
  form.n.value = '';
  attached = entry.source ? [{blob: entry.source, name: 'the same picture'}] : [];
  $('mode').value = entry.verb;
  write(entry.words);
  note(`Words, seed ${entry.seed} and settings are filled in; the seed stays until it is emptied in the settings.`, true);
}

/** Put a picture into the message. */
function take(blob, verb) {
  attached = [{blob, name: 'this picture'}];
  $('mode').value = verb;
  write($('words').value);
}

function write(words) {
  $('words').value = words;
  grow();
  closePanels();
  $('words').focus();
  return look();
}

function toast(text, label, act) {
  const box = $('toast');
  clearTimeout(toast.timer);
  const end = () => { box.replaceChildren(); };
  box.replaceChildren(make('span', {textContent: text}), button(label, () => { end(); act(); }));
  toast.timer = setTimeout(end, 10000);
}

// --- the composer

/** Say what went wrong, or a hint, until something else is done. */
function note(text, hint = false) {
  $('note').textContent = text;
  $('note').classList.toggle('hint', hint);
}

function grow() {
  $('words').style.height = 'auto';
  $('words').style.height = `${$('words').scrollHeight + 2}px`;
}

const verbNow = () => ($('mode').value === 'auto' ? taken.verb : $('mode').value);
const pictureNow = () => (attached.length ? attached : current ? [{blob: current, name: 'the last picture'}] : []);

function showComposer() {
  const verb = verbNow(), go = $('go');
  go.textContent = running ? 'Cancel' : DOING[verb];
  go.classList.toggle('stop', Boolean(running));
  $('mode').options[0].textContent = `Auto: ${DOING[taken.verb].toLowerCase()}`;
  const used = attached.length || verb === 'generate' ? attached : pictureNow();
  $('attached').replaceChildren(...used.map((one) => make(
    'div', {className: 'thumb'}, make('img', {src: urlOf(one.blob), alt: '', className: 'small'}),
    make('span', {textContent: one.name}),
    button('✕', () => {
      attached = attached.filter((other) => other !== one);
      if (one.blob === current) forget();
      look();
    }, {ariaLabel: `Leave out ${one.name}`}),
  )));
  $('words').placeholder = {
    generate: 'Describe a picture', edit: 'Say what to change', ask: 'Ask about the picture',
    reconstruct: 'No words needed',
  }[verb];
  showShapes();
}

function forget() {
  current = null;
  said = [];
}

/** Ask how the words would be taken, a moment after they were written. */
async function look() {
  const text = $('words').value.trim(), number = look.number = (look.number ?? 0) + 1;
  const pictures = pictureNow().length > 0;
  let found = {verb: pictures ? 'edit' : 'generate', text, unread: []};
  if (!card.abilities.includes(found.verb)) found.verb = card.abilities[0] ?? 'generate';
  try {
    if (text) found = await json('/v1/intent', {text, has_picture: pictures});
  } catch { /* sending says what is wrong */ }
  if (number === look.number) {
    taken = found;
    $('unread').textContent = warning(found.unread);
    showComposer();
  }
  return found;
}

function warning(words, verb = verbNow()) {
  if (!words?.length) return '';
  const what = verb === 'ask' ? 'The answer may be about' : 'The picture will show';
  return `Never read in training: ${words.slice(0, 10).join(', ')}. ${what} something else.`;
}

async function attach(files) {
  note('');
  for (const file of files) {
    const name = file.name || 'the picture';
    const good = KINDS.includes(file.type) && await createImageBitmap(file).then(() => true, () => false);
    if (good) attached = [...attached, {blob: file, name}];
    else note(`${name} is no picture that can be read; PNG, JPEG, WebP and GIF can.`);
  }
  await look();
}

// --- sending

function settings() {
  const found = {};
  for (const field of $('values').elements) {
    if (!field.name || field.value === '' || (field.type === 'radio' && !field.checked)) continue;
    const plain = field.type === 'number' || field.name === 'image_size';
    found[field.name] = plain ? Number(field.value) : field.value;
  }
  return found;
}

function turn(verb, words, pictures, values) {
  const bar = make('progress', {ariaLabel: 'Progress'}), state = make('p', {className: 'facts', textContent: 'Waiting …'});
  const side = make('div', {className: 'side'}, make('p', {className: 'said', textContent: words}), verb === 'ask' ? '' : bar, state);
  const seen = make('div', {className: 'pictures'});
  if (verb === 'ask') seen.append(...pictures.map((one) => picture(one.blob, 'the picture asked about')));
  else seen.append(make('figure', {className: 'pending', dataset: {size: sizeFor(verb === 'generate' && values.shape || '1:1', values.image_size ?? card.image_size)}}));
  const found = make('article', {className: `turn ${verb}`}, seen.childElementCount ? seen : '', side);
  $('start').hidden = true;
  $('new').hidden = false;
  $('talk').append(found);
  follow = true;
  refit();
  return {found, seen, side, bar, state};
}

/** Bring the newest turn into sight: all of it, or else its beginning. */
function down() {
  const last = $('talk').lastElementChild, high = last.offsetHeight > $('talk').clientHeight;
  if (last.className) last.scrollIntoView({block: high ? 'start' : 'end'});
}

async function submit(given) {
  if (running) return running.abort();
  running = new AbortController();
  try {
    await perform(given);
  } finally {
    running = null;
    look();
  }
}

async function perform(given) {
  note('');
  const words = given?.words ?? $('words').value.trim(), auto = !given && $('mode').value === 'auto';
  const found = given ?? await look();
  const verb = given || auto ? found.verb : $('mode').value;
  const pictures = given?.pictures ?? (verb === 'generate' ? [] : pictureNow());
  if (!words && verb !== 'reconstruct') return note('There are no words; say what you want.');
  const odd = [...$('values').elements].find((field) => field.validity.badInput || field.valueAsNumber > Number.MAX_SAFE_INTEGER);
  if (odd) return note(`${odd.labels[0].textContent.trim()} of the settings is no number that can be used; up to ${Number.MAX_SAFE_INTEGER} can.`);
  if (!pictures.length && (verb === 'edit' || verb === 'reconstruct')) return note('Add a picture first, or draw one.');
  const before = {attached, words: $('words').value, mode: $('mode').value};
  if (!given) {
    attached = [];
    $('words').value = '';
    $('mode').value = 'auto';
    grow();
  }
  clearTimeout(look.timer);
  $('unread').textContent = '';
  const values = {...settings(), ...given?.values}, place = turn(verb, words || 'Encoded and drawn again', pictures, values);
  showComposer();
  try {
    const text = verb === 'generate' && found.verb === verb && found.text ? found.text : words;
    await {ask, generate: draw, edit: draw, reconstruct}[verb](verb, text, pictures, values, place, auto);
  } catch (error) {
    place.found.remove();
    $('start').hidden = $('talk').querySelector('.turn') !== null;
    if (!given && !$('words').value.trim() && !attached.length) {  // what was written meanwhile stays
      attached = before.attached;
      $('words').value = before.words;
      $('mode').value = before.mode;
      grow();
    }
    if (!(error instanceof Refused) && error.name !== 'AbortError') console.error(error);
    note(error.name === 'AbortError' ? 'Cancelled.' : error.message, error.name === 'AbortError');
  }
}

function form(pictures, fields) {
  const found = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== undefined) found.append(name, value);
  for (const one of pictures) found.append('image', one.blob, 'picture.png');
  return found;
}

async function draw(verb, words, pictures, values, place, auto) {
  const started = performance.now(), made = [], {fit, shape, best_of, plan, ...rest} = values;
  const fields = {prompt: words, ...rest, stream: true, include_progress: true, partial_images: best_of > 1 && verb === 'generate' ? 0 : 3};
  const size = shape && sizeFor(shape, values.image_size ?? card.image_size);
  const body = verb === 'edit' ? form(pictures, {...fields, fit}) : {...fields, size, best_of, plan};
  const path = verb === 'edit' ? '/v1/images/edits' : '/v1/images/generations';
  for await (const event of events(path, body, running.signal)) {
    if (event.type.endsWith('.queued')) place.state.textContent = `In the queue, ${event.ahead} ahead`;
    if (event.type.endsWith('.progress')) {
      place.bar.max = event.steps;
      place.bar.value = event.step;
      place.state.textContent = `Step ${event.step} of ${event.steps}`;
    }
    if (event.type.endsWith('.partial_image') && !(values.n > 1) && pictures.length < 2) {
      place.seen.firstChild.replaceChildren(make('img', {src: `data:image/png;base64,${event.b64_json}`, alt: 'so far'}));
    }
    if (event.type.endsWith('.completed')) made.push(event);
  }
  if (!made.length) throw new Refused('The server ended before the picture was done; send it again.');
  const own = card.sampling, count = values.n ?? 1;
  const entries = made.map((event, i) => ({
    verb, words, seed: event.seed, size: sizeOf(event), blob: toBlob(event.b64_json), when: Date.now(),
    source: pictures[Math.floor(i / count)]?.blob, seconds: i ? undefined : (performance.now() - started) / 1000,
    plan: event.plan,
    settings: {
      best_of: best_of ?? '', plan: plan ?? '', shape: shape ?? '1:1', preset: values.preset ?? '', steps: values.steps ?? (values.preset ? '' : own.num_inference_steps), guidance: values.guidance ?? own.guidance_scale,
      solver: values.solver ?? '', negative_prompt: values.negative_prompt ?? '', image_size: values.image_size ?? '', fit: fit ?? '', model: values.model ?? '',
    },
  }));
  await finish(entries, place, auto, made[0].unilip);
  const again = () => submit({words, verb, pictures, values: {seed: undefined}});
  place.side.append(acts(entries, again));
  refit();
}

async function reconstruct(verb, words, pictures, values, place) {
  const fields = Object.fromEntries(Object.entries(values).filter(([name]) => ['fit', 'image_size', 'model'].includes(name)));
  const found = await json('/v1/images/reconstructions', form(pictures, fields), running.signal);
  const entries = found.data.map((one, i) => ({
    verb, words: 'Encoded and drawn again', psnr: one.psnr ?? undefined, size: sizeOf(one),
    blob: toBlob(one.b64_json), source: pictures[i].blob, when: Date.now(),
  }));
  await finish(entries, place, false);
  place.side.append(acts(entries));
  refit();
}

async function finish(entries, place, auto, notes = {}) {
  await gallery.put(...entries);
  showGallery();
  forget();
  current = entries.at(-1).blob;
  place.seen.classList.toggle('many', entries.length > 1);
  place.seen.replaceChildren(...entries.map((one) => picture(one.blob, one.words, () => view(one))));
  if (entries.length === 1 && entries[0].verb === 'reconstruct') {  // beside what it is to be compared with
    place.seen.prepend(picture(entries[0].source, 'The source'));
    place.seen.classList.add('many');
  }
  place.bar.remove();
  if (entries[0].plan) place.side.append(make('p', {className: 'soft plan', textContent: `Written out: ${entries[0].plan}`}));
  place.state.textContent = entries.length === 1 ? factsOf(entries[0]) : `${entries.length} pictures; click one for more`;
  how(place, entries[0].verb, auto, notes);
}

/** Say how a message was taken, with a way to take it otherwise, and which of its words are unknown. */
function how(place, verb, auto, notes = {}) {
  if (notes?.unread?.length) place.side.append(make('p', {className: 'warn', textContent: warning(notes.unread, verb)}));
  if (notes?.warning) place.side.append(make('p', {className: 'warn', textContent: notes.warning}));
  const other = verb === 'ask' ? (current ? 'edit' : 'generate') : 'ask';
  if (!auto || !card.abilities.includes(other)) return;
  const words = place.side.firstChild.textContent;
  const instead = button(`${DOING[other].toLowerCase()} instead`, () => {
    $('mode').value = other;
    write(words);
  });
  place.side.append(make('p', {className: 'soft taken'}, `Taken as ${TAKEN[verb]}; `, instead));
}

function acts(entries, again = null) {
  const [entry] = entries, one = entries.length === 1, can = (verb) => one && card.abilities.includes(verb);
  return make(
    'div', {className: 'acts'},
    can('edit') ? button('Edit', () => take(entry.blob, 'edit')) : '', can('ask') ? button('Ask', () => take(entry.blob, 'ask')) : '',
    again ? button('Again', again, {title: 'The same words with another seed'}) : '',
    one && entry.source ? button('Compare', () => view(entry, {blob: entry.source, words: 'before'})) : '',
    one ? button('Download', () => download(entry)) : '',
  );
}

async function ask(verb, words, pictures, values, place, auto) {
  if (pictures.length && (pictures.length > 1 || pictures[0].blob !== current)) {
    forget();
    current = pictures[0].blob;
  }
  const urls = await Promise.all(pictures.map((one) => toURL(one.blob)));
  const shownFirst = urls.map((url) => ({type: 'image_url', image_url: {url}}));
  const answer = make('p', {className: 'answer'});
  place.state.before(answer);
  let text = '', notes = {};
  const read = async (history) => {
    const turns = [...history, {role: 'user', content: words}].map((one) => ({...one}));
    turns[0].content = [{type: 'text', text: turns[0].content}, ...shownFirst];
    const body = {messages: turns, modalities: ['text'], stream: true, max_tokens: 256, ...(values.model ? {model: values.model} : {})};
    for await (const chunk of events('/v1/chat/completions', body, running.signal)) {
      text += chunk.choices[0]?.delta.content ?? '';
      notes = chunk.unilip ?? notes;
      answer.textContent = text;
      if (text) place.state.textContent = '';
      if (follow) down();
    }
  };
  try {
    await read(said);
  } catch (error) {
    if (error.status !== 400 || !said.length) throw error;
    said = [];  // longer than the model reads: the question alone
    await read(said);
  }
  said = [...said, {role: 'user', content: words}, {role: 'assistant', content: text || '(no answer)'}];
  answer.textContent = text || 'No answer.';
  place.state.remove();
  how(place, 'ask', auto, notes);
  refit();
}

// --- the page

function panel(name, open) {
  const element = $(name), wide = name === 'gallery' && matchMedia(OPEN).matches;
  if (name === 'gallery') element.classList.toggle('open', open);
  else element.hidden = !open;
  $(`show-${name}`).setAttribute('aria-expanded', String(open));
  if (open && !wide) element.querySelector('.close').focus();
  refit();
}

function closePanels() {
  if (!matchMedia(OPEN).matches) for (const name of ['gallery', 'settings']) panel(name, false);
}

function describe() {
  const {about, sampling, limits, image_size: side} = card, form = $('values').elements;
  const count = about.parameters >= 1e9 ? `${(about.parameters / 1e9).toFixed(1)} billion` : `${(about.parameters / 1e6).toFixed(1)} million`;
  const facts = {
    Model: about.model ?? card.id, Parameters: about.parameters ? count : '', Draws: `${side} × ${side} px`,
    Runs: about.device ? `${about.device}, ${about.dtype}, performance: ${about.performance}` : '', Version: about.version ?? '', Can: about.can ?? '', Cannot: about.cannot ?? '',
  };
  $('facts').replaceChildren(...Object.entries(facts).filter(([, value]) => value)
    .flatMap(([name, value]) => [make('dt', {textContent: name}), make('dd', {textContent: value})]));
  $('model').textContent = `${facts.Model} · ${side} px`;
  $('can').textContent = about.can ? `This model draws ${about.can}` : '';
  form.n.max = form.best_of.max = limits.count;
  form.best_of.parentElement.hidden = !card.abilities.includes('ask');
  form.plan.parentElement.hidden = !sampling.plan;
  if (!card.few_steps?.length) form.preset.querySelector('[value=turbo]')?.remove();
  $('shapes').replaceChildren(...SHAPES.map((name, i) => make(
    'label', {}, make('input', {type: 'radio', name: 'shape', value: name, className: 'unseen', defaultChecked: i === 0}), make('i', {ariaHidden: 'true'}), name,
  )));
  for (const chip of $('shapes').children) {
    chip.firstChild.setAttribute('form', 'values');
    chip.children[1].style.aspectRatio = chip.firstChild.value.replace(':', '/');
  }
  form.steps.max = limits.steps;
  form.steps.placeholder = sampling.num_inference_steps;
  form.guidance.placeholder = sampling.guidance_scale;
  form.solver.replaceChildren(...['', 'dpm++', 'euler', 'unipc'].map((name) => make('option', {value: name, textContent: name || sampling.solver})));
  form.model.parentElement.hidden = cards.length < 2;
  form.model.replaceChildren(...cards.map(({id}, i) => make('option', {value: i ? id : '', textContent: i ? id.slice(card.id.length + 1) : 'none'})));
  const sizes = [1, 1.5, 2].map((times) => Math.floor(side * times / 28) * 28).filter((size) => size === side || size <= limits.image_size);
  form.image_size.replaceChildren(...sizes.map((size) => make('option', {value: size === side ? '' : size, textContent: `${size} px`})));
  for (const option of $('mode').options) option.hidden = option.disabled = option.value !== 'auto' && !card.abilities.includes(option.value);
  $('prompts').replaceChildren(...(about.prompts ?? []).slice(0, 4).map((words) => button(words, async () => { $('mode').value = 'generate'; await write(words); submit(); })));
  const samples = [...(about.edits ?? []).slice(0, 2).map((one) => [...one, 'edit']), ...(about.questions ?? []).slice(0, 2).map((one) => [...one, 'ask'])];
  $('samples').replaceChildren(...samples.filter(([, , verb]) => card.abilities.includes(verb)).map(([file, words, verb]) => {
    const image = make('img', {src: `page/${file}`, alt: '', className: 'small'});
    return make('button', {type: 'button', onclick: async () => {
      attached = [{blob: await (await send(`page/${file}`)).blob(), name: file}];
      $('mode').value = verb;
      await write(words);
      submit();
    }}, image, make('span', {textContent: words}));
  }));
  $('start').hidden = $('talk').querySelector('.turn') !== null;
}

function askForKey(why) {
  $('key-note').textContent = why || 'Whoever runs it has set one (--api-key).';
  $('key-text').value = '';
  if (!$('key').open) $('key').showModal();
  return new Promise((done) => {
    $('key-form').onsubmit = (event) => {
      event.preventDefault();
      $('key').close();
      done($('key-text').value.trim());
    };
  });
}

function wire() {
  const talk = new ResizeObserver(refit);
  talk.observe($('talk'));
  talk.observe($('composer'));
  for (const kind of ['wheel', 'touchmove', 'keydown']) $('talk').addEventListener(kind, () => { follow = false; }, {passive: true});
  $('composer').onsubmit = (event) => { event.preventDefault(); submit(); };
  $('words').onkeydown = (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) submit();
  };
  $('words').oninput = () => {
    grow();
    clearTimeout(look.timer);
    look.timer = setTimeout(look, 200);
  };
  $('mode').onchange = () => { showComposer(); $('words').focus(); };
  $('attach').onclick = () => $('files').click();
  $('files').onchange = async () => { await attach([...$('files').files]); $('files').value = ''; };
  $('new').onclick = () => {
    running?.abort();
    forget();
    for (const one of document.querySelectorAll('.turn')) one.remove();
    $('start').hidden = false;
    $('new').hidden = true;
    write('');
  };
  for (const name of ['gallery', 'settings']) {
    $(`show-${name}`).onclick = () => panel(name, $(`show-${name}`).getAttribute('aria-expanded') !== 'true');
    $(name).querySelector('.close').onclick = () => { panel(name, false); $(`show-${name}`).focus(); };
  }
  $('viewer').querySelector('.close').onclick = () => $('viewer').close();
  $('viewer').onclick = (event) => { if (event.target === $('viewer')) $('viewer').close(); };
  $('key').oncancel = (event) => event.preventDefault();
  $('clear').onclick = () => remove(...gallery.entries);
  $('values').onsubmit = (event) => event.preventDefault();
  $('values').elements.image_size.onchange = showShapes;
  $('values').onreset = () => setTimeout(showShapes);
  document.onkeydown = (event) => {
    if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
    const open = ['settings', 'gallery'].find((name) => $(`show-${name}`).getAttribute('aria-expanded') === 'true');
    if (open) $(open).querySelector('.close').click();
    else running?.abort();
  };
  document.onpaste = (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    attach(files);
  };
  document.ondragover = (event) => {
    if (!event.dataTransfer.types.includes('Files')) return;
    event.preventDefault();
    over().classList.add('over');
  };
  const over = () => $($('train').open && !$('train-form').hidden ? 'train' : 'composer');
  document.ondragleave = (event) => { if (!event.relatedTarget) over().classList.remove('over'); };
  document.ondrop = (event) => {
    const files = [...event.dataTransfer.files];
    if (!files.length) return;  // words that are dragged go where they are dropped
    event.preventDefault();
    over().classList.remove('over');
    if (over().id === 'train') takeToTrain(files);
    else if (!$('train').open) attach(files);
  };
}

wire();
onKey(askForKey);
await gallery.open();
showGallery();
try {
  cards = (await json('/v1/models')).data;
  [card] = cards;
  describe();
  if (card.about.trains) {
    wireTraining(make, card.image_size, async (name) => {
      cards = (await json('/v1/models')).data;
      describe();
      $('values').elements.model.value = `${card.id}:${name}`;
      look();
    });
  }
  await look();
} catch (error) {
  note(error.message);
}
$('words').focus();
