// The page's trainings: pictures with texts, what it will take, how it goes, and the adapter at the end.

import {json, send} from './api.js';

const $ = (id) => document.getElementById(id);
const SIDE = 448;  // pictures are sent no larger than this, or twice what the model draws
let items = [];  // pictures with their texts, in order; of a pair the first one's text counts
let most = SIDE;
let shown = '';  // the sheet that is seen
let timer = null;
let done = () => {};  // told when an adapter has been trained
let make = null;

/** Groups of one picture, or of two. */
const rows = () => (pairs() ? items.filter((_, i) => i % 2 === 0).map((one, i) => items.slice(2 * i, 2 * i + 2)) : items.map((one) => [one]));
const pairs = () => $('train-form').elements.kind.value === 'edit';
const state = (text, wrong = false) => { $('train-note').textContent = text; $('train-note').classList.toggle('hint', !wrong); };
const clock = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);

/** A picture as PNG, no larger than the training can use. */
async function smaller(file) {
  const image = await createImageBitmap(file), scale = Math.min(1, most / Math.max(image.width, image.height));
  const canvas = Object.assign(document.createElement('canvas'), {width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale))});
  const context = canvas.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((end) => { canvas.toBlob(end, 'image/png'); });
}

/** Take files: pictures by name, in pairs where edits are taught; a text of the same name becomes the caption. */
export async function take(files) {
  const stem = (name) => name.replace(/\.[^.]*$/, '').replace(/\.(input|output)$/, '');
  const texts = new Map();
  for (const file of [...files].sort((a, b) => a.name.localeCompare(b.name, undefined, {numeric: true}))) {
    if (file.name.endsWith('.txt')) texts.set(stem(file.name), (await file.text()).trim().replace(/\s+/g, ' '));
    else {
      const blob = await smaller(file).catch(() => null);
      if (blob) items.push({name: stem(file.name), blob, text: ''});
      else state(`${file.name} is no picture that can be read; it was left out.`, true);
    }
  }
  for (const one of items) one.text ||= texts.get(one.name) ?? '';
  show();
}

/** The pictures with their texts, each to be changed or left out. */
function show() {
  const what = pairs() ? 'What was changed, as an instruction' : 'What is in the picture';
  $('train-rows').replaceChildren(...rows().map((row, i) => make(
    'div', {className: 'row'},
    ...row.map(({blob}, k) => make('img', {src: URL.createObjectURL(blob), alt: `${k ? 'after' : 'picture'} ${i + 1}`, onload: (event) => URL.revokeObjectURL(event.target.src)})),
    make('input', {value: row[0].text, placeholder: what, ariaLabel: `Text of picture ${i + 1}`, maxLength: 1000, oninput: (event) => { row[0].text = event.target.value; count(); }}),
    make('button', {type: 'button', className: 'plain', textContent: '✕', ariaLabel: `Leave out picture ${i + 1}`, onclick: () => { items = items.filter((one) => !row.includes(one)); show(); }}),
  )));
  count();
}

function count() {
  const each = pairs() ? 2 : 1, all = rows(), whole = all.filter((row) => row.length === each && row[0].text.trim()).length;
  const {fewest, max} = $('train-rows').dataset;
  $('train-count').textContent = all.length
    ? `${whole} of ${all.length} ${pairs() ? 'pairs' : 'pictures'} are complete; ${fewest} to ${max} are needed.`
    : pairs() ? `${fewest} to ${max} pairs: before and after follow each other by name (1.input.png, 1.output.png).` : `${fewest} to ${max} pictures; a text file of the same name is its caption.`;
  $('train-go').disabled = whole !== all.length || whole < fewest || whole > max;
}

async function estimate() {
  const {kind, steps} = $('train-form').elements;
  state('Measuring what it takes on this computer …');
  try {
    const found = await json(`/v1/training/estimate?kind=${kind.value}&steps=${steps.value}`);
    state(`About ${found.memory.toFixed(2)} GiB of ${found.usable.toFixed(0)} usable, and ${clock(found.hours * 3600)}, on ${found.hardware}.`);
  } catch (error) {
    state(error.message, true);
  }
}

async function begin(event) {
  event.preventDefault();
  const {name, kind, steps} = $('train-form').elements, form = new FormData();
  for (const [field, value] of Object.entries({name: name.value.trim(), kind: kind.value, steps: steps.value, texts: JSON.stringify(rows().map(([one]) => one.text.trim()))})) form.append(field, value);
  for (const {blob} of items) form.append('image', blob, 'picture.png');
  await call(form, '');
}

async function call(body, path) {
  state('');
  try {
    tell(await json(`/v1/training${path}`, body));
    watch();
  } catch (error) {
    state(error.message, true);
  }
}

/** Show how the training goes. */
async function tell(found) {
  const busy = ['running', 'stopping'].includes(found.status), step = found.step ?? 0;
  Object.assign($('train-rows').dataset, {fewest: found.fewest, max: found.most});
  $('train-form').hidden = busy;
  $('train-progress').hidden = found.status === 'idle';
  $('train-stop').hidden = !busy;
  $('train-bar').max = found.steps ?? 1;
  $('train-bar').value = step;
  const loss = found.loss == null ? '' : `, loss ${found.loss.toFixed(3)}`, left = found.left == null ? '' : `, about ${clock(found.left)} left`;
  $('train-state').textContent = {
    running: `${found.name}: step ${step} of ${found.steps}${loss}${left}`, stopping: `${found.name}: saving itself …`,
    stopped: `${found.name} was stopped at step ${step}; its pictures and last checkpoint are kept.`,
    done: `${found.name} is done: choose it as Adapter in the settings.`, failed: `${found.name} failed: ${found.error}`,
  }[found.status] ?? '';
  $('train-state').classList.toggle('warn', found.status === 'failed');
  $('train-unfinished').replaceChildren(...(busy ? [] : found.unfinished).map((name) => make('button', {type: 'button', className: 'plain', textContent: `Go on with ${name}`, onclick: () => call({name}, '/continue')})));
  count();
  if (found.sheet && found.sheet !== shown) {
    shown = found.sheet;
    const image = $('train-sheet');
    image.src = URL.createObjectURL(await (await send('/v1/training/sheet')).blob());
    image.hidden = false;
  } else if (!found.sheet) $('train-sheet').hidden = true;
  return busy;
}

async function watch() {
  clearTimeout(timer);
  try {
    const found = await json('/v1/training');
    if (await tell(found)) timer = setTimeout(watch, 1000);
    else if (watch.busy && found.status === 'done') done(found.name);
    watch.busy = ['running', 'stopping'].includes(found.status);
  } catch (error) {
    state(error.message, true);
    timer = setTimeout(watch, 5000);
  }
}

export function wireTraining(making, side, ended) {
  [make, most, done] = [making, Math.min(SIDE, 2 * side), ended];
  const form = $('train-form');
  $('show-train').hidden = false;
  $('show-train').onclick = () => { $('train').showModal(); watch(); };
  $('train').querySelector('.close').onclick = () => $('train').close();
  $('train-files').onchange = async (event) => { await take(event.target.files); event.target.value = ''; };
  $('train-add').onclick = () => $('train-files').click();
  $('train-estimate').onclick = estimate;
  $('train-stop').onclick = () => call({}, '/stop');
  form.elements.kind.onchange = show;
  form.onsubmit = begin;
  watch();
}
