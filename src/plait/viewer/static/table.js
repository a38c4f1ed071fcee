// Many runs: a table that draws the rows in view, and accuracy against critical path by model and family.

const ROW = 34;

const COLUMNS = [
  { key: 'question', name: 'Question', wide: true, about: 'What was asked' },
  { key: 'model', name: 'Model', about: 'The weights that answered' },
  { key: 'right', name: 'Right', about: 'Whether the answer is known to be right', show: (r) => ({ true: '\u2713', false: '\u2717' })[r.right] || '' },
  { key: 'answer', name: 'Answer', about: 'What the run answered' },
  { key: 'threads', name: 'Threads', number: true, about: 'Parts that were worked on side by side' },
  { key: 'total_tokens', name: 'Tokens', number: true, about: 'All that were sampled, in all threads' },
  {
    key: 'critical_path_tokens', name: 'Critical path', number: true,
    about: 'The longest chain of tokens that wait for each other; the bar is its share of all tokens',
  },
  {
    key: 'wall_s', name: 'Time', number: true, about: 'On the machine it ran on',
    show: (r) => (r.wall_s === null ? '' : seconds(r.wall_s)),
  },
  { key: 'stop', name: 'Ended', about: 'Why the run ended', show: (r) => STOPS[r.stop] || r.stop || 'cut off' },
];

class RunTable {
  // open(index of a run)
  constructor(rows, groups, { open }) {
    this.rows = rows;
    this.open = open;
    this.sort = { key: null, down: true };
    this.filter = el('input', {
      class: 'filter', type: 'search', placeholder: 'Filter: words, model:name, family:name, wrong, forked',
      'aria-label': 'Filter runs', oninput: () => this.update(),
    });
    this.note = el('span', { class: 'dim' });
    this.head = el('div', { class: 'tr head', role: 'row' });
    this.space = el('div', { class: 'space' });
    this.list = el('div', { class: 'rows', tabindex: 0, role: 'grid', 'aria-label': 'Runs', onscroll: () => this.paint() }, this.space);
    this.at = 0;
    this.models = [...new Set([...groups, ...rows].map((each) => each.model))];
    this.node = el('div', { class: 'runs' },
      el('p', { class: 'sentence' }, this._sentence(rows)),
      groups.length > 1 || rows.length > 2 ? scatter(rows, groups, {
        models: this.models,
        open: (i) => open(i),
        filter: (text) => { this.filter.value = text; this.update(); },
      }) : null,
      el('div', { class: 'tools' }, this.filter, this.note),
      el('div', { class: 'table' }, this.head, this.list));
    this.observer = new ResizeObserver(() => this.paint());
    this.observer.observe(this.list);
    this.update();
  }

  _sentence(rows) {
    const known = rows.filter((r) => r.right !== null && r.right !== undefined);
    const right = known.filter((r) => r.right).length;
    const forked = rows.filter((r) => r.threads > 0).length;
    const parts = [`${count(rows.length, 'run')}, ${forked.toLocaleString('en')} of them forked`];
    if (known.length) parts.push(`${right.toLocaleString('en')} of ${known.length.toLocaleString('en')} are right`);
    return `${parts.join('; ')}. Open one to see its threads.`;
  }

  update() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.shown = this.rows.filter((r) => words.every((word) => {
      if (word === 'wrong') return r.right === false;
      if (word === 'right') return r.right === true;
      if (word === 'forked') return r.threads > 0;
      if (word.startsWith('model:')) return String(r.model).toLowerCase() === word.slice(6);
      if (word.startsWith('family:')) return String(r.family).toLowerCase() === word.slice(7);
      return `${r.question} ${r.model} ${r.family} ${r.answer} ${r.stop}`.toLowerCase().includes(word);
    }));
    const { key, down } = this.sort;
    if (key) {
      const rank = (v) => (v === null || v === undefined ? -Infinity : typeof v === 'boolean' ? Number(v) : v);
      this.shown.sort((a, b) => {
        const x = rank(a[key]), y = rank(b[key]);
        const order = typeof x === 'string' || typeof y === 'string' ? String(x).localeCompare(String(y)) : x - y;
        return down ? -order : order;
      });
    }
    this.note.textContent = this.shown.length === this.rows.length ? '' : `${this.shown.length} of ${this.rows.length}`;
    this.head.replaceChildren(...COLUMNS.map((column) => el('button', {
      class: cellKind(column), role: 'columnheader', 'data-hint': column.about,
      onclick: () => {
        this.sort = { key: column.key, down: key === column.key ? !down : Boolean(column.number) };
        this.update();
      },
    }, column.name, key === column.key ? (down ? ' \u2193' : ' \u2191') : '')));
    this.space.style.height = `${this.shown.length * ROW}px`;
    this.list.style.height = `${Math.min(Math.max(1, this.shown.length), 16) * ROW + 2}px`;
    this.at = clamp(0, this.at, Math.max(0, this.shown.length - 1));
    this.paint();
  }

  paint() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const last = Math.min(this.shown.length, first + Math.ceil((this.list.clientHeight || 500) / ROW) + 8);
    const most = Math.max(1, ...this.shown.slice(first, last).map((r) => r.total_tokens || 0));
    const nodes = [];
    for (let i = first; i < last; i++) {
      const r = this.shown[i];
      const node = el('div', {
        class: `tr${i === this.at ? ' at' : ''}${r.run === null ? ' still' : ''}`, role: 'row',
        title: r.run === null ? 'a result without a logged run' : undefined,
        onclick: () => { this.at = i; this.paint(); if (r.run !== null) this.open(r.run); },
      }, COLUMNS.map((column) => this._cell(column, r, most)));
      node.style.top = `${i * ROW}px`;
      nodes.push(node);
    }
    const none = this.rows.length ? 'No run is like that.' : 'No run yet.';
    this.space.replaceChildren(...nodes, this.shown.length ? '' : el('p', { class: 'none' }, none));
  }

  _cell(column, r, most) {
    const value = column.show ? column.show(r) : r[column.key];
    const shown = typeof value === 'number' ? value.toLocaleString('en') : value ?? '';
    const grade = column.key === 'right' ? (r.right ? ' good' : ' bad') : '';
    const node = el('span', { class: `${cellKind(column)}${grade}`, role: 'gridcell' }, String(shown));
    if (column.wide) node.prepend(modelMark(this.models.indexOf(r.model)));
    if (column.key === 'critical_path_tokens') {
      const bar = el('i', { class: 'spark' }, el('i', {}));
      bar.style.width = `${46 * (r.total_tokens || 0) / most}px`;
      bar.firstChild.style.width = `${100 * (r.critical_path_tokens || 0) / Math.max(1, r.total_tokens)}%`;
      node.prepend(bar);
    }
    return node;
  }

  key(e) {
    if (e.key === 'ArrowDown' || e.key === 'ArrowUp' || e.key === 'j' || e.key === 'k') {
      this.at = clamp(0, this.at + (e.key === 'ArrowDown' || e.key === 'j' ? 1 : -1), this.shown.length - 1);
      const top = this.at * ROW;
      this.list.scrollTop = clamp(top - this.list.clientHeight + ROW, this.list.scrollTop, top);
      this.paint();
    } else if (e.key === 'Enter' && this.shown[this.at] && this.shown[this.at].run !== null) {
      this.open(this.shown[this.at].run);
    } else if (e.key === '/') {
      this.filter.focus();
    } else return false;
    return true;
  }

  close() { this.observer.disconnect(); }
}

const cellKind = ({ wide, number }) => `td${wide ? ' wide' : ''}${number ? ' number' : ''}`;

// Accuracy against critical path: a mark for each model and family, lines between models on the same family.
// Where nothing is known to be right or wrong: all tokens against critical path, a mark for each run.
function scatter(rows, groups, { models, open, filter }) {
  const known = groups.length > 0;
  const points = known
    ? groups.map((g) => ({ x: g.critical_path_tokens, y: g.accuracy, low: g.accuracy_low, high: g.accuracy_high, of: g }))
    : rows.slice(0, 2000).map((r) => ({ x: r.critical_path_tokens, y: r.total_tokens, of: r }));
  const W = window.innerWidth < 560 ? 380 : 760, H = window.innerWidth < 560 ? 230 : 300, L = 54, R = 16, T = 14, B = 40;
  const xs = points.map((p) => p.x);
  const most = Math.max(...xs) * 1.08 || 1;
  const floor = known ? Math.max(0, Math.floor((Math.min(...points.map((p) => p.low)) - 0.02) * 10) / 10) : 0;
  const ceiling = known ? 1 : Math.max(...points.map((p) => p.y)) * 1.05 || 1;
  const x = (v) => L + v / most * (W - L - R), y = (v) => H - B - (v - floor) / (ceiling - floor) * (H - T - B);
  const tip = el('div', { class: 'tip', hidden: true });
  const art = svg('svg', { viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${known ? 'Accuracy' : 'Tokens'} against critical path` });
  const text = (at, down, content, anchor = 'middle') => {
    const node = svg('text', { x: at, y: down, 'text-anchor': anchor });
    node.append(content);
    art.append(node);
  };
  for (const tick of ticks(0, most, W / 110, true)) {
    art.append(svg('line', { class: 'grid', x1: x(tick), x2: x(tick), y1: T, y2: H - B }));
    text(x(tick), H - B + 16, tick.toLocaleString('en'));
  }
  for (const tick of ticks(floor, ceiling, 5, !known)) {
    art.append(svg('line', { class: 'grid', x1: L, x2: W - R, y1: y(tick), y2: y(tick) }));
    text(L - 8, y(tick) + 4, known ? `${Math.round(tick * 100)} %` : tick.toLocaleString('en'), 'end');
  }
  text((L + W - R) / 2, H - 6, known ? 'critical path, mean tokens' : 'critical path, tokens');
  if (known) {
    for (const family of new Set(groups.map((g) => g.family))) {
      const pair = points.filter((p) => p.of.family === family);
      if (pair.length !== 2) continue;
      const [a, b] = pair;
      art.append(svg('line', { class: 'pair', x1: x(a.x), y1: y(a.y), x2: x(b.x), y2: y(b.y) }));
    }
  }
  for (const p of points) {
    const kind = models.indexOf(p.of.model), mark = svg('g', { class: `mark m${Math.min(kind, 3)}`, tabindex: 0 });
    if (known) mark.append(svg('line', { x1: x(p.x), x2: x(p.x), y1: y(Math.max(floor, p.low)), y2: y(p.high) }));
    mark.append(kind % 2 ? svg('rect', { x: x(p.x) - 4.5, y: y(p.y) - 4.5, width: 9, height: 9, rx: 1.5 })
      : svg('circle', { cx: x(p.x), cy: y(p.y), r: known ? 5.5 : 4 }));
    const say = () => {
      tip.replaceChildren(...(known
        ? [el('b', {}, p.of.family), el('span', {}, p.of.model),
          el('span', {}, `${(p.y * 100).toFixed(1)} % right (${(p.low * 100).toFixed(1)} to ${(p.high * 100).toFixed(1)}) of ${p.of.n}`),
          el('span', {}, `critical path ${p.x.toFixed(1)} of ${p.of.total_tokens.toFixed(1)} tokens`)]
        : [el('b', {}, p.of.question), el('span', {}, p.of.model), el('span', {}, `critical path ${p.x} of ${p.y} tokens`)]));
      tip.hidden = false;
      tip.style.left = `${clamp(12, x(p.x) / W * 100, 72)}%`;
      tip.style.top = `${y(p.y) / H * 100}%`;
    };
    mark.addEventListener('pointerenter', say);
    mark.addEventListener('focus', say);
    mark.addEventListener('pointerleave', () => { tip.hidden = true; });
    mark.addEventListener('blur', () => { tip.hidden = true; });
    mark.addEventListener('click', () => {
      if (known) filter(`model:${p.of.model} family:${p.of.family}`); else if (p.of.run !== null) open(p.of.run);
    });
    art.append(mark);
  }
  const named = models.slice(0, 4).map((model, i) => [model, model || 'unknown model', i]);
  const key = el('div', { class: 'key' }, named.map(([, name, i]) => el('span', {}, modelMark(i), name)));
  return el('div', { class: 'overview' },
    el('figure', { class: 'scatter' }, key, el('div', { class: 'plot' }, art, tip)),
    known && el('dl', { class: 'totals' }, named.map(([model, name, i]) => totals(name, groups.filter((g) => g.model === model), i))));
}

// The mark of a model in the plot, its key and the table.
const modelMark = (i) => el('i', { class: `model m${Math.min(i, 3)} ${i % 2 ? 'square' : 'dot'}` });

// A model over all its families.
function totals(name, groups, i) {
  const n = groups.reduce((sum, g) => sum + g.n, 0), mean = (key) => groups.reduce((sum, g) => sum + g.n * g[key], 0) / n;
  return el('div', {}, el('dt', { class: `m${i}` }, name),
    el('dd', {}, el('b', {}, `${(100 * mean('accuracy')).toFixed(1)} %`), ` right of ${n.toLocaleString('en')}`),
    el('dd', {}, el('b', {}, mean('critical_path_tokens').toFixed(0)), ` of ${mean('total_tokens').toFixed(0)} tokens on the critical path`));
}
