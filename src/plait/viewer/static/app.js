// The page: which view is shown, and which keys do what. The address says where one is: #trace=3, #race=0,1, #runs.

const KEYS = [
  ['1 2 3', 'axis: time, steps, positions'], ['arrows', 'threads and tokens'], ['w s', 'zoom in and out'], ['a d', 'move'],
  ['0', 'show all'], ['f', 'fold the lane'], ['p', 'pack the lanes'], ['Enter', 'fold the text'], ['space', 'replay'],
  ['h', 'shade doubt'], ['g', 'hide tags'], ['[ ]', 'run before, run after'], ['r', 'race'], ['l', 'list of runs'],
  ['/', 'filter, or ask'], ['t', 'dark or light'], ['Esc', 'let go'],
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
    const key = ([name, what]) => el('div', {}, el('dt', {}, el('kbd', {}, name)), el('dd', {}, what));
    this.help = el('dialog', { class: 'help', onclick: () => this.help.close() }, el('h2', {}, 'Keys'), el('dl', {}, KEYS.map(key)));
    const trace = (run) => new TraceView(run, { watched: true });
    this.live = live ? new AskView({ keep: (run) => this._keep(run), trace }) : null;
    const tip = el('div', { class: 'tip floating', role: 'tooltip', hidden: true });
    document.getElementById('app').append(
      el('header', { class: 'top' },
        el('a', { class: 'brand', href: '#', 'aria-label': 'Plait' }, mark(), 'plait'), this.tabs, el('span', { class: 'gap' }),
        el('button', { class: 'icon', title: 'Keys (?)', 'aria-label': 'Keys', onclick: () => this.help.showModal() }, '?'),
        el('button', { class: 'icon', title: 'Dark or light (t)', 'aria-label': 'Dark or light', onclick: () => this.theme() }, '\u25d0')),
      this.main, this.help, tip);
    showHints(tip);
    this._theme = remembered();
    if (this._theme) document.documentElement.dataset.theme = this._theme;
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
      run: i, question: about.meta.question || about.name, family: about.meta.family || '',
      model: String(about.meta.model || '').split('@')[0],
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
    const { meta, name, usage, answer, right, wall, stop } = run;
    const about = { meta, name, usage, answer, right, wall_s: wall, stop };
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
    const title = ({ meta, name }) => `${cut(String(meta.question || name), 40)} (${String(meta.model || name).split('@')[0]})`;
    const options = (chosen) => this.abouts.slice(0, 500).map((about, k) => el('option', { value: k, selected: k === chosen }, title(about)));
    const left = el('select', { 'aria-label': 'First run', onchange: () => this.go(`race=${left.value},${j}`) }, options(i));
    const right = el('select', { 'aria-label': 'Second run', onchange: () => this.go(`race=${i},${right.value}`) }, options(j));
    const choose = this.abouts.length > 2 ? el('span', { class: 'choose' }, left, right) : null;
    return new RaceView(this.run(i), this.run(j), { choose });
  }

  _tabs() {
    const { name, numbers } = this.at, tabs = [];
    const tab = (title, hash, on) => tabs.push(el('a', { href: `#${hash}`, 'aria-current': on ? 'page' : undefined }, title));
    if (this.live) tab('Ask', 'ask', name === 'ask');
    if (this.rows.length > (this.live ? 0 : 1)) tab(`Runs ${big(this.rows.length)}`, 'runs', name === 'runs');
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
    try { localStorage.setItem('plait-theme', this._theme); } catch { /* a file may have no storage */ }
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

// The theme that was chosen before, where the browser keeps such things.
function remembered() {
  try {
    const theme = localStorage.getItem('plait-theme');
    return theme === 'dark' || theme === 'light' ? theme : null;
  } catch { return null; }
}

function mark() {
  return svg('svg', { viewBox: '0 0 32 32', 'aria-hidden': 'true' },
    svg('path', { d: 'M3 16h5c7 0 7-9 14-9h7' }), svg('path', { d: 'M3 16h5c7 0 7 9 14 9h7' }),
    svg('path', { class: 'lead', d: 'M3 16h26' }));
}

new App(JSON.parse(document.getElementById('data').textContent));
