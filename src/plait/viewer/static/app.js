// The page: which view is shown, and which keys do what. The address says where one is: #trace=3, #race=0,1, #runs.

class TraceView {
  constructor(run, { others = [], open = null, race = null } = {}) {
    this.run = run;
    this.hover = el('div', { class: 'tip floating', hidden: true });
    this.stage = el('div', { class: 'stage' });
    const pick = (segment, token) => this.pick(segment, token);
    this.reading = new Reading(run, { pick });
    this.side = el('aside', {});
    this.lanes = new Lanes(run, { pick, hover: (hit, x, y) => this._tip(hit, x, y) });
    this.player = new Player(run.wall || 1e-3, (clock) => this.seek(clock));
    this.axes = el('div', { class: 'segmented', role: 'radiogroup', 'aria-label': 'Axis' },
      Object.entries(AXES).map(([key, axis], i) => el('button', {
        role: 'radio', 'data-axis': key, title: `${axis.about} (${i + 1})`, onclick: () => this.setAxis(key),
      }, axis.name)));
    this.heat = el('button', { class: 'toggle', 'aria-pressed': 'false', title: 'Shade tokens that the model was unsure of (h)', onclick: () => this._heat() }, 'Doubt');
    this.pack = run.threads.size > 4 ? el('button', { class: 'toggle fit', title: 'Threads that follow each other share lanes (p)', onclick: () => this.lanes.pack(!this.lanes.packed) }, 'Pack') : null;
    const twins = others.map((other) => el('button', { class: 'toggle', onclick: () => race(other.index) }, `Race ${other.run.model || other.run.name}`));
    this.title = el('h1', {});
    this.sentence = el('p', { class: 'sentence' });
    this.stats = el('dl', { class: 'stats' });
    this.node = el('div', { class: 'trace' },
      this.title, this.sentence, this.stats,
      el('div', { class: 'tools' }, this.axes, this.player.node, el('span', { class: 'gap' }), twins.slice(0, 2), this.heat,
        run.id ? el('a', { class: 'toggle', href: `/plait/runs/${run.id}/log`, download: `${run.id}.jsonl`, title: 'The log: plait view reads it' }, 'Log') : null,
        this.pack, el('button', { class: 'toggle fit', title: 'Show all of it (0)', onclick: () => this.lanes.fit() }, 'Fit')),
      this.stage, legend(),
      el('div', { class: 'columns' },
        el('div', { class: 'textual' },
          el('div', { class: 'bar' }, el('h3', {}, 'Text'),
            el('button', { class: 'link', onclick: () => this.reading.foldAll(true) }, 'fold all'),
            el('button', { class: 'link', onclick: () => this.reading.foldAll(false) }, 'unfold')),
          this.reading.node),
        this.side),
      this.hover);
    this.head();
    this.setAxis(this.lanes.axis);
    this.pick(null, null);
    this.lanes.attach(this.stage);
  }

  head() {
    const { run } = this, usage = run.usage, stats = [];
    const stat = (name, value, title, kind) => stats.push(el('div', { title, class: kind }, el('dt', {}, name), el('dd', {}, value)));
    this.title.textContent = run.question;
    this.sentence.textContent = sentence(run);
    if (run.answer !== null) {
      stat('answer', run.right === null ? run.answer : `${run.answer} ${run.right ? '\u2713' : '\u2717'}`, 'what the run answers', run.right === false ? 'bad' : 'lead');
    }
    stat('wall', seconds(run.wall), 'seconds from the start of the run to its last event');
    if (usage) {
      stat('critical path', `${usage.critical_path_tokens.toLocaleString('en')} of ${usage.sampled_tokens.toLocaleString('en')}`, 'sampled tokens on the longest dependent chain, of all');
      stat('threads', usage.threads ? `${usage.threads} in ${count(usage.forks, 'fork')}` : 'none', 'forked threads');
      stat('longest context', usage.longest_context_tokens.toLocaleString('en'), 'positions of the longest context that a thread held');
      if (usage.reread_tokens) stat('read again', usage.reread_tokens.toLocaleString('en'), 'tokens given to the parent again at joins');
    }
    stat('ended', run.stop ? run.stop : run.cut ? 'cut off' : 'running', run.note || run.cut || 'why the run ended', run.stop && run.stop !== 'eos' || run.cut ? 'bad' : '');
    for (const key of ['model', 'format', 'engine']) if (run.meta[key]) stat(key, String(run.meta[key]).split('@')[0], String(run.meta[key]), 'quiet');
    this.stats.replaceChildren(...stats);
  }

  setAxis(axis) {
    this.lanes.setAxis(axis);
    for (const button of this.axes.children) {
      button.setAttribute('aria-checked', String(button.dataset.axis === this.lanes.axis));
      button.disabled = button.dataset.axis !== 'time' && !this.run.derived;
    }
  }

  pick(segment, token) {
    const seen = segment && token !== null ? this.run.sees(segment, token) : null;
    this.lanes.select(segment, token, seen);
    this.reading.select(segment, token, seen);
    this.side.replaceChildren(inspector(this.run, segment, token, seen, (s, i) => this.pick(s, i)));
    this.side.classList.toggle('has', Boolean(segment));
  }

  seek(clock) {
    if (clock !== null && this.lanes.axis !== 'time') this.setAxis('time');
    this.lanes.clock = clock;
    this.lanes.draw();
    this.reading.setClock(clock);
  }

  // A live run has new events.
  refresh() {
    this.head();
    this.lanes.clock = this.run.finished ? null : this.run.wall;
    this.lanes.draw();
    this.reading.refresh();
    this.player.setEnd(this.run.wall || 1e-3);
  }

  _heat() {
    const on = this.reading.node.classList.toggle('heat');
    this.heat.setAttribute('aria-pressed', String(on));
  }

  _tip(hit, x, y) {
    this.hover.hidden = !hit || !hit.segment;
    if (this.hover.hidden) return;
    const { segment: s, token } = hit, run = this.run, thread = run.threads.get(s.thread);
    const lines = [el('b', {}, thread.up ? `${run.title(thread)}  ${run.label(thread)}` : 'root', el('small', {}, s.id))];
    lines.push(el('span', {}, `${count(s.sampled.length, 'token')} in ${seconds(s.t[1] - s.t[0])}`));
    if (s.joins.length) lines.push(el('span', {}, `joins ${count(s.joins.length, 'thread')} by ${s.join}`));
    if (s.note || BROKEN.has(s.stop)) lines.push(el('span', { class: 'bad' }, s.note || s.stop));
    if (token !== null && token !== undefined) {
      lines.push(el('span', { class: 'dim' }, `${s.inserted(token) ? 'inserted' : 'sampled'}: `, el('code', {}, run.text(s.token(token)))));
    }
    this.hover.replaceChildren(...lines);
    this.hover.style.left = `${Math.min(x + 14, window.innerWidth - 270)}px`;
    this.hover.style.top = `${y + 18 + 110 > window.innerHeight ? y - 110 : y + 18}px`;
  }

  key(e) {
    const at = this.lanes.selected, token = this.lanes.token, run = this.run;
    switch (e.key) {
      case '1': case '2': case '3': this.setAxis(Object.keys(AXES)[Number(e.key) - 1]); return true;
      case 'x': { const keys = Object.keys(AXES); this.setAxis(keys[(keys.indexOf(this.lanes.axis) + 1) % 3]); return true; }
      case ' ': this.player.toggle(); return true;
      case 'h': this._heat(); return true;
      case 'Escape':
        if (this.player.clock !== null) this.player.reset();
        this.pick(null, null);
        return true;
      case 'ArrowDown': case 'ArrowUp': case 'j': case 'k': {
        const threads = run.order(), down = e.key === 'ArrowDown' || e.key === 'j';
        const next = at ? threads.indexOf(run.threads.get(at.thread)) + (down ? 1 : -1) : 0;
        if (threads[next]) this.pick(threads[next].segments[0], null);
        return true;
      }
      case 'ArrowRight': case 'ArrowLeft': {
        if (!at) { this.pick(run.order()[0].segments[0], null); return true; }
        const right = e.key === 'ArrowRight', own = run.threads.get(at.thread).segments, here = own.indexOf(at);
        const next = token === null ? (right ? at.forced.length : at.length - 1) : token + (right ? 1 : -1);
        if (next >= 0 && next < at.length) this.pick(at, next);
        else if (own[here + (right ? 1 : -1)]) {
          const other = own[here + (right ? 1 : -1)];
          if (other.length) this.pick(other, right ? 0 : other.length - 1);
        }
        return true;
      }
      case 'Enter': if (at) this.reading.fold(run.threads.get(at.thread)); return Boolean(at);
      default: return this.lanes.key(e);
    }
  }

  restyle() { this.lanes.draw(); }

  close() { this.player.close(); this.lanes.close(); }
}

// What is seen, in one sentence.
function sentence(run) {
  const usage = run.usage;
  if (run.cut) return `${run.cut[0].toUpperCase()}${run.cut.slice(1)}.`;
  if (!usage) return `${run.threads.size > 1 ? count(run.threads.size - 1, 'thread') : 'One line'} so far.`;
  if (!usage.threads) return `One line of ${count(usage.sampled_tokens, 'token')}: each waits for the one before.`;
  const times = usage.sampled_tokens / Math.max(1, usage.critical_path_tokens);
  return `It split into ${count(usage.threads, 'thread')} side by side: ${usage.sampled_tokens.toLocaleString('en')} tokens in ${usage.critical_path_tokens.toLocaleString('en')} steps, ${times.toFixed(2)} at a time.`;
}

function legend() {
  const item = (kind, text) => el('span', {}, el('i', { class: kind }), text);
  return el('div', { class: 'legend' }, item('critical', 'critical path'), item('beside', 'beside it'),
    item('given', 'not sampled: inserted, or waiting for the engine'), item('wait', 'waits for threads'),
    item('forced', 'closed by the runtime'), item('broken', 'cancelled'));
}

const KEYS = [
  ['1 2 3', 'axis: time, steps, positions'], ['arrows', 'threads and tokens'], ['w s', 'zoom in and out'], ['a d', 'move'],
  ['0', 'show all'], ['f', 'fold the lane'], ['p', 'pack the lanes'], ['Enter', 'fold the text'], ['space', 'replay'], ['h', 'shade doubt'],
  ['[ ]', 'run before, run after'], ['r', 'race'], ['l', 'list of runs'], ['/', 'filter, or ask'], ['t', 'dark or light'], ['Esc', 'let go'],
];

class App {
  constructor({ data, live }) {
    const values = data || { runs: [], records: [], groups: [] };
    this.abouts = values.runs;
    this.groups = values.groups || [];
    this.rows = [...values.runs.map((about, i) => this._row(about, i)), ...values.records.map((r) => ({ ...r, run: null }))];
    this.runs = new Map();
    this.view = null;
    this.tabs = el('nav', { 'aria-label': 'Views' });
    this.main = el('main', {});
    this.help = el('dialog', { class: 'help', onclick: () => this.help.close() },
      el('h2', {}, 'Keys'), el('dl', {}, KEYS.map(([key, what]) => el('div', {}, el('dt', {}, el('kbd', {}, key)), el('dd', {}, what)))));
    this.live = live ? new AskView({ keep: (run) => this._keep(run), trace: (run) => new TraceView(run) }) : null;
    document.getElementById('app').append(
      el('header', { class: 'top' },
        el('a', { class: 'brand', href: '#', 'aria-label': 'Plait' }, mark(), 'plait'), this.tabs, el('span', { class: 'gap' }),
        el('button', { class: 'icon', title: 'Keys (?)', 'aria-label': 'Keys', onclick: () => this.help.showModal() }, '?'),
        el('button', { class: 'icon', title: 'Dark or light (t)', 'aria-label': 'Dark or light', onclick: () => this.theme() }, '\u25d0')),
      this.main, this.help);
    this._theme = null;
    palette.read();
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this._restyle());
    window.addEventListener('hashchange', () => this.show());
    window.addEventListener('keydown', (e) => this.key(e));
    this.show();
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }

  _row(about, i) {
    const usage = about.usage || {};
    return {
      run: i, question: about.meta.question || about.name, family: about.meta.family || '', model: String(about.meta.model || '').split('@')[0],
      answer: about.answer, right: about.right, threads: usage.threads || 0, total_tokens: usage.sampled_tokens || 0,
      critical_path_tokens: usage.critical_path_tokens || 0, wall_s: about.wall_s, stop: about.stop,
    };
  }

  run(i) {
    if (!this.runs.has(i)) this.runs.set(i, new Run(this.abouts[i]));
    return this.runs.get(i);
  }

  _keep(run) {
    const i = this.abouts.length;
    const about = { meta: run.meta, name: run.name, usage: run.usage, answer: run.answer, right: run.right, wall_s: run.wall, stop: run.stop };
    this.abouts.push(about);
    this.runs.set(i, run);
    this.rows.unshift(this._row(about, i));
    this._tabs();
  }

  // Other runs of the same question.
  twins(i) {
    const own = this.abouts[i].meta, out = [];
    for (let j = 0; j < this.abouts.length && out.length < 2; j++) {
      const meta = this.abouts[j].meta;
      if (j !== i && meta.question && meta.question === own.question && meta.model !== own.model) out.push(j);
    }
    return out;
  }

  home() {
    if (this.live) return '#ask';
    if (this.abouts.length === 1 && this.rows.length === 1) return '#trace=0';
    if (this.abouts.length === 2 && this.rows.length === 2 && this.twins(0).length) return '#race=0,1';
    return '#runs';
  }

  show() {
    const [name, value = ''] = (location.hash.length > 1 ? location.hash : this.home()).slice(1).split('=');
    const numbers = value.split(',').map(Number).filter((n) => Number.isInteger(n) && n >= 0 && n < this.abouts.length);
    if (this.view) this.view.close();
    this.at = { name, numbers };
    if (name === 'trace' && numbers.length === 1) this.view = this._trace(numbers[0]);
    else if (name === 'race' && numbers.length === 2) this.view = this._race(...numbers);
    else if (name === 'ask' && this.live) this.view = this.live;
    else {
      this.at = { name: 'runs', numbers: [] };
      this.view = new RunTable(this.rows, this.groups, { open: (i) => this.go(`trace=${i}`) });
    }
    this.main.replaceChildren(this.view.node);
    if (this.view.lanes) this.view.lanes.resize();
    this._tabs();
    window.scrollTo(0, 0);
  }

  go(hash) { location.hash = hash; }

  _trace(i) {
    const others = this.twins(i).map((index) => ({ index, run: this.run(index) }));
    return new TraceView(this.run(i), { others, race: (j) => this.go(`race=${i},${j}`) });
  }

  _race(i, j) {
    const options = (chosen) => this.abouts.slice(0, 500).map((about, k) => el('option', { value: k, selected: k === chosen }, `${cut(about.meta.question || about.name, 40)} (${String(about.meta.model || about.name).split('@')[0]})`));
    const left = el('select', { 'aria-label': 'First run', onchange: () => this.go(`race=${left.value},${j}`) }, options(i));
    const right = el('select', { 'aria-label': 'Second run', onchange: () => this.go(`race=${i},${right.value}`) }, options(j));
    const choose = this.abouts.length > 2 ? el('span', { class: 'choose' }, left, right) : null;
    return new RaceView(this.run(i), this.run(j), { choose });
  }

  _tabs() {
    const { name, numbers } = this.at, tabs = [];
    const tab = (title, hash, on) => tabs.push(el('a', { href: `#${hash}`, 'aria-current': on ? 'page' : undefined }, title));
    if (this.live) tab('Ask', 'ask', name === 'ask');
    if (this.rows.length > 1 || (this.live && this.rows.length)) tab(`Runs ${this.rows.length.toLocaleString('en')}`, 'runs', name === 'runs');
    const at = numbers[0] ?? 0;
    if (this.abouts.length && !(this.live && name === 'ask')) tab('Trace', `trace=${at}`, name === 'trace');
    const pair = this._pair(at, numbers);
    if (pair && !(this.live && name === 'ask')) tab('Race', `race=${pair}`, name === 'race');
    this.tabs.replaceChildren(...tabs);
  }

  _pair(at, numbers) {
    if (numbers.length === 2) return numbers.join(',');
    const other = this.abouts.length ? this.twins(at)[0] : undefined;
    if (other !== undefined) return `${at},${other}`;
    return this.abouts.length === 2 ? '0,1' : null;
  }

  theme() {
    const dark = this._theme ? this._theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    this._theme = dark ? 'light' : 'dark';
    document.documentElement.dataset.theme = this._theme;
    this._restyle();
  }

  _restyle() {
    palette.read();
    if (this.view && this.view.restyle) this.view.restyle();
  }

  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const typing = e.target.closest && e.target.closest('input:not([type=range]):not([type=checkbox]), select, textarea');
    if (typing) { if (e.key === 'Escape') e.target.blur(); return; }
    if (this.help.open) return;
    if (e.target.closest && e.target.closest('button, a') && (e.key === ' ' || e.key === 'Enter')) return;
    if (this.view.key && this.view.key(e)) { e.preventDefault(); return; }
    const at = this.at.numbers[0] ?? 0;
    if (e.key === '?') this.help.showModal();
    else if (e.key === 't') this.theme();
    else if (e.key === 'l' && this.rows.length) this.go('runs');
    else if (e.key === 'r') { const pair = this._pair(at, this.at.numbers); if (pair) this.go(`race=${pair}`); }
    else if (e.key === ']' && at + 1 < this.abouts.length) this.go(`trace=${at + 1}`);
    else if (e.key === '[' && at > 0) this.go(`trace=${at - 1}`);
    else return;
    e.preventDefault();
  }
}

function mark() {
  return svg('svg', { viewBox: '0 0 32 32', 'aria-hidden': 'true' },
    svg('path', { d: 'M3 16h5c7 0 7-9 14-9h7' }), svg('path', { d: 'M3 16h5c7 0 7 9 14 9h7' }), svg('path', { class: 'lead', d: 'M3 16h26' }));
}

new App(JSON.parse(document.getElementById('data').textContent));
