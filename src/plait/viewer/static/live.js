// Asks a server: `POST /plait/runs` answers with the run's events as they happen, one JSON line each.

// Asks and reads the run. Leaving (abort) cancels it at the server.
const ask = (body, signal, on) => stream('/plait/runs', {
  method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal,
}, on);

// Reads one run; calls `on(run)` after every batch.
async function stream(address, options, on) {
  const reply = await fetch(address, options).catch((failure) => {
    throw failure.name === 'AbortError' ? failure : new Error('The server does not answer. Is `plait serve` still running?');
  });
  if (!reply.ok) {
    let message = `the server says ${reply.status}`;
    try { message = (await reply.json()).error.message || message; } catch { /* no JSON: the status is all there is */ }
    throw new Error(message);
  }
  const id = reply.headers.get('x-plait-run-id') || '';
  let run = new Run(), last = null;
  run.id = /^[\w-]+$/.test(id) ? id : '';
  const reader = reply.body.getReader(), decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value || new Uint8Array(), { stream: !done });
    const frames = rest.split(/\r?\n\r?\n/);
    rest = frames.pop();
    for (const frame of frames) {
      const { name, data } = parseFrame(frame);
      if (data === '') continue;
      const about = JSON.parse(data);
      if (name === 'message') run.apply(about);
      else if (name === 'run') last = about;
      else if (name === 'usage') { run.usage = run.usage || about; run.answer = about.answer ?? run.answer; }
      else if (name === 'error') { run.cut = run.cut || 'the run failed'; on(run); throw new Error(about.error.message); }
    }
    if (last) {
      const whole = new Run(last);
      whole.id = run.id;
      if (run.answer !== null) whole.answer = run.answer;
      run = whole;
      last = null;
    }
    if (frames.length) on(run);
    if (done) break;
  }
  if (!run.finished) { run.cut = 'the stream ended before the run'; on(run); }
  return run;
}

function parseFrame(frame) {
  let name = 'message';
  const data = [];
  for (const line of frame.split(/\r?\n/)) {
    if (line.startsWith('event:')) name = line.slice(6).trim();
    else if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
  }
  return { name, data: data.join('\n') };
}

const ABOUT = 'It splits a question where the parts do not need each other, works on them side by side, and joins what they found.';
const EXAMPLES = ['What is 347 * 526?', 'What is 347 * 52, 88 + 977 and 612 * 34?', 'What is 34 * 27 + 58 * 16?'];

class AskView {
  // keep(run): the run goes to the list; show(view): what a finished run is looked at with
  constructor({ keep, trace }) {
    this.keep = keep;
    this.trace = trace;
    this.models = [];
    this.box = el('input', {
      class: 'question', type: 'text', placeholder: 'Type a question, watch it split', 'aria-label': 'Question',
      autocomplete: 'off', spellcheck: 'false', maxlength: 4000,
    });
    this.model = el('select', { 'aria-label': 'Model', onchange: () => this._chosen() });
    this.race = el('input', { type: 'checkbox', id: 'race' });
    this.go = el('button', { class: 'go', type: 'submit' }, 'Ask');
    this.stop = el('button', { class: 'go quiet', type: 'button', hidden: true, onclick: () => this.abort.abort() }, 'Stop');
    this.error = el('p', { class: 'error', role: 'alert', hidden: true });
    this.raceLabel = el('label', { for: 'race', class: 'check' }, this.race, 'race its sequential twin');
    this.examples = el('span', { class: 'examples' }, EXAMPLES.map((q) => button('chip', q, 'Ask this', () => { this.box.value = q; this.run(); })));
    this.under = el('div', { class: 'under' });
    this.node = el('div', { class: 'ask idle' },
      el('header', { class: 'hero' }, splitting(), el('h1', {}, 'Watch a model think in parallel'),
        el('p', { class: 'sentence' }, ABOUT)),
      el('form', { onsubmit: (e) => { e.preventDefault(); this.run(); } }, this.box, this.model, this.go, this.stop),
      el('div', { class: 'tools' }, this.raceLabel, this.examples),
      this.error, this.under);
    this._models();
    this._recent();
  }

  // What this server ran of late; one that still runs is followed.
  async _recent() {
    let runs = [];
    try { runs = (await (await fetch('/plait/runs')).json()).data || []; } catch { /* nothing to list */ }
    if (!runs.length || this.view) return;
    const open = (r) => this._read([r.model], (i, abort, on) =>
      stream(`/plait/runs/${encodeURIComponent(r.id)}/events`, { signal: abort.signal }, on));
    const about = (r) => [r.model, r.usage ? count(r.usage.threads, 'thread') : '', r.done ? '' : 'running'].filter(Boolean).join(', ');
    this.under.replaceChildren(el('div', { class: 'recent' }, el('h3', {}, 'Recent runs'), runs.slice(0, 12).map((r) =>
      el('button', { onclick: () => open(r) }, el('span', {}, r.question || r.id), el('small', {}, about(r))))));
  }

  async _models() {
    try {
      const reply = await fetch('/v1/models');
      this.models = (await reply.json()).data || [];
    } catch { this.models = []; }
    const usual = (m) => Boolean(m.plait && m.plait.default);
    this.model.replaceChildren(...this.models.map((m) => el('option', { value: m.id, selected: usual(m) }, m.id)));
    this.model.hidden = this.models.length < 2;
    this._chosen();
  }

  // What the server says of the model that is asked.
  about() { return (this.models.find((m) => m.id === this.model.value) || {}).plait || {}; }

  twin() {
    const { twin } = this.about();
    return twin && this.models.some((m) => m.id === twin) ? twin : null;
  }

  _chosen() {
    this.raceLabel.hidden = !this.twin();
    // The examples are what Plait's own models know.
    this.examples.hidden = Boolean(this.about().plain);
  }

  async run() {
    const question = this.box.value.trim();
    if (!question) return;
    // What follows is watched, and keys are for that.
    this.box.blur();
    const models = this.race.checked && this.twin() ? [this.model.value, this.twin()] : [this.model.value];
    await this._read(models, (i, abort, on) => ask(models[i] ? { question, model: models[i] } : { question }, abort.signal, on));
  }

  // What went wrong in a line, and what would do in those after it.
  _say(message) {
    const [first, ...rest] = message.split('\n');
    this.error.replaceChildren(el('b', {}, first), rest.length ? el('span', {}, rest.join('\n')) : '');
    this.error.hidden = false;
  }

  // Shows runs while `read(i, abort, on)` reads each of them.
  async _read(models, read) {
    if (this.abort) this.abort.abort();
    this.node.classList.remove('idle');
    const abort = this.abort = new AbortController();
    this.error.hidden = true;
    this.stop.hidden = false;
    this._clear();
    this.under.append(el('p', { class: 'waiting' }, 'Asked. Waiting for the model to begin.'));
    const runs = models.map(() => new Run());
    let pending = 0;
    const seen = (i, run) => {
      runs[i] = run;
      if (!pending) pending = requestAnimationFrame(() => { pending = 0; if (this.abort === abort) this._draw(runs); });
    };
    try {
      const done = await Promise.all(models.map((_, i) => read(i, abort, (run) => seen(i, run))));
      cancelAnimationFrame(pending);
      this._finish(done);
    } catch (failure) {
      if (this.abort !== abort) return;
      abort.abort();
      const stopped = failure.name === 'AbortError';
      this._say(stopped ? 'Stopped. The server has cancelled all of its threads.' : failure.message);
      for (const run of runs) if (!run.finished) run.cut = stopped ? 'the run was stopped here' : 'the run failed here';
      if (this.view) this.view.refresh();
      else this._clear();
    } finally {
      if (this.abort === abort) this.stop.hidden = true;
    }
  }

  _draw(runs) {
    if (runs.some((run) => !run.segments.size)) return;
    const same = this.view && this.shown.length && this.shown.every((run, i) => run === runs[i]);
    if (same) return this.view.refresh();
    this._clear();
    this.shown = [...runs];
    this.view = runs.length > 1 ? new RaceView(runs[0], runs[1], { together: true }) : this.trace(runs[0]);
    this.under.append(this.view.node);
    this.view.refresh();
  }

  // A run that was over before it could be watched is replayed slowly.
  _finish(runs) {
    this.shown = [];
    this._draw(runs);
    runs.forEach((run) => this.keep(run));
    if (this.view && Math.max(...runs.map((run) => run.wall)) < 1.5) {
      this.view.player.play();
    }
  }

  _clear() {
    if (this.view) this.view.close();
    this.view = null;
    this.shown = [];
    this.under.replaceChildren();
  }

  key(e) {
    if (e.key === '/') { this.box.focus(); return true; }
    return this.view ? this.view.key(e) : false;
  }

  restyle() { if (this.view) this.view.restyle(); }

  close() { /* kept while other views are shown: its run goes on */ }
}

// One line that splits in three and joins again: what this page is about.
function splitting() {
  const path = (d, kind) => svg('path', { d, class: kind, pathLength: 1 });
  return svg('svg', { class: 'splitting', viewBox: '0 0 640 72', 'aria-hidden': 'true' },
    path('M170 36C210 36 206 12 246 12H394C434 12 430 36 470 36', 'beside'),
    path('M170 36C210 36 206 60 246 60H334', 'beside'),
    path('M338 60H394C434 60 430 36 470 36', 'waits'),
    path('M4 36H636', 'lead'));
}
