// The text of a run, token by token, and what one token is. Blocks are drawn as they come into view.

const CHUNK = 60;

class Reading {
  // on: {pick(segment, token)}
  constructor(run, on = {}) {
    this.run = run;
    this.on = on;
    this.folded = new Set();
    this.clock = null;
    this.selected = null;
    this.seen = null;
    this.items = new Map();
    this.body = el('div', { class: 'body' });
    this.node = el('div', { class: 'reading', tabindex: -1, 'aria-label': 'Text of the run' }, this.body);
    this.node.addEventListener('click', (e) => this._click(e));
    this.node.addEventListener('scroll', () => this._near(), { passive: true });
    this.render();
  }

  // Segments that are not folded away.
  list() {
    return this.run.reading().filter((s) => {
      const thread = this.run.threads.get(s.thread);
      if (this.folded.has(thread) && s !== thread.segments[0]) return false;
      for (let up = thread.up; up; up = up.up) if (this.folded.has(up)) return false;
      return true;
    });
  }

  render(at = 0) {
    this.order = this.list();
    this.first = Math.max(0, Math.min(at, this.order.length - CHUNK));
    this.next = this.first;
    this.items.clear();
    this.body.replaceChildren();
    if (this.first) {
      this.body.append(el('button', { class: 'more', onclick: () => this.render(this.first - CHUNK) },
        `${count(this.first, 'segment')} before`));
    }
    this._more();
  }

  _more() {
    const until = Math.min(this.order.length, this.next + CHUNK), fragment = document.createDocumentFragment();
    for (; this.next < until; this.next++) fragment.append(this._item(this.order[this.next]));
    this.body.append(fragment);
  }

  _near() {
    const { scrollTop, clientHeight, scrollHeight } = this.node;
    if (scrollTop + 2 * clientHeight > scrollHeight && this.next < this.order.length) this._more();
  }

  // New segments and tokens of a live run.
  refresh() {
    const order = this.list();
    const same = this.order.every((s, i) => order[i] === s);
    if (!same) return this.render(this.first);
    this.order = order;
    if (this.next < order.length && this.next - this.first < 4 * CHUNK) this._more();
    for (const [segment, item] of this.items) {
      if (item.spans.length < segment.length) {
        this._spans(segment, item);
        const much = item.node.querySelector('.much');
        if (much) much.textContent = this._much(this.run.threads.get(segment.thread));
      }
      if (segment.stop && !item.ended) this._ending(segment, item);
      this._show(segment, item);
    }
    this.node.scrollTop = this.node.scrollHeight;
  }

  _item(segment) {
    const thread = this.run.threads.get(segment.thread), first = thread.segments[0] === segment;
    const node = el('section', { class: `said${segment.critical ? ' critical' : ''}` });
    node.style.setProperty('--depth', Math.min(thread.depth, 5));
    if (first && thread.up) {
      const folded = this.folded.has(thread);
      const head = el('button', { class: 'thread', 'aria-expanded': String(!folded) },
        el('span', { class: 'caret' }, folded ? '\u25b8' : '\u25be'),
        el('b', {}, this.run.title(thread)),
        el('span', { class: 'told' }, this.run.label(thread)),
        el('span', { class: 'much' }, this._much(thread)));
      head.addEventListener('click', (e) => { e.stopPropagation(); this.fold(thread); });
      node.append(head);
      if (folded) {
        const item = { node, spans: [], shown: 0, ended: true };
        this.items.set(segment, item);
        return node;
      }
    }
    const text = el('p', {});
    node.append(text);
    const item = { node, text, spans: [], shown: 0, ended: false };
    this.items.set(segment, item);
    this._spans(segment, item);
    if (segment.stop) this._ending(segment, item);
    this._mark(segment, item);
    return node;
  }

  _much(thread) { return count(thread.segments.reduce((n, s) => n + s.sampled.length, 0), 'token'); }

  _spans(segment, item) {
    if (!item.text) return;
    for (let i = item.spans.length; i < segment.length; i++) {
      const id = segment.token(i), text = this.run.text(id);
      const kind = `${segment.inserted(i) ? 'given' : ''}${this.run.control(id) ? ' control' : ''}`;
      const span = el('span', { class: kind || undefined }, text);
      span.at = [segment, i];
      const p = segment.logprob(i);
      if (p !== null && p < -0.01) span.style.setProperty('--heat', String(clamp(0, -p / 3, 1)));
      item.spans.push(span);
      item.text.append(span);
    }
    item.shown = item.spans.length;
    this._show(segment, item);
  }

  _ending(segment, item) {
    item.ended = true;
    if (!segment.note && !BROKEN.has(segment.stop)) return;
    item.node.append(el('small', { class: BROKEN.has(segment.stop) ? 'bad' : '' }, segment.note || STOPS[segment.stop]));
  }

  fold(thread) {
    if (!this.folded.delete(thread)) this.folded.add(thread);
    const top = this.node.scrollTop;
    const rendered = this.next - this.first;
    this.render(this.first);
    while (this.next - this.first < rendered && this.next < this.order.length) this._more();
    this.node.scrollTop = top;
  }

  foldAll(folded) {
    this.folded.clear();
    if (folded) for (const thread of this.run.threads.values()) if (thread.up) this.folded.add(thread);
    this.render();
  }

  // Show what was there at a time; null shows all.
  setClock(clock) {
    this.clock = clock;
    for (const [segment, item] of this.items) this._show(segment, item);
  }

  _show(segment, item) {
    const n = Math.min(item.spans.length, this.run.shown(segment, this.clock));
    for (let i = n; i < item.shown; i++) item.spans[i].hidden = true;
    for (let i = item.shown; i < n; i++) item.spans[i].hidden = false;
    item.shown = n;
    item.node.hidden = this.clock !== null && segment.t[0] > this.clock;
    const working = this.clock === null ? !this.run.finished && !segment.stop : segment.t[0] <= this.clock && this.clock < segment.t[1];
    item.node.classList.toggle('working', working);
  }

  select(segment, token, seen) {
    this.selected = segment ? [segment, token] : null;
    this.seen = seen;
    if (segment) this.reveal(segment, token);
    for (const [s, item] of this.items) this._mark(s, item);
  }

  _mark(segment, item) {
    const seen = this.seen ? this.seen.get(segment) || 0 : Infinity;
    item.node.classList.toggle('unseen', seen === 0);
    if (item.marked || seen < segment.length || (this.selected && this.selected[0] === segment)) {
      const on = this.selected && this.selected[0] === segment ? this.selected[1] : null;
      item.spans.forEach((span, i) => {
        span.classList.toggle('on', i === on);
        span.classList.toggle('later', seen > 0 && i >= seen);
      });
      item.marked = true;
    }
    item.node.classList.toggle('here', Boolean(this.selected && this.selected[0] === segment));
  }

  reveal(segment, token) {
    let item = this.items.get(segment);
    if (!item) {
      const thread = this.run.threads.get(segment.thread);
      for (let up = thread; up; up = up.up) this.folded.delete(up);
      this.render(Math.max(0, this.list().indexOf(segment) - 4));
      item = this.items.get(segment);
    }
    if (!item) return;
    const target = token !== null && item.spans[token] ? item.spans[token] : item.node;
    const box = target.getBoundingClientRect(), frame = this.node.getBoundingClientRect();
    if (box.top < frame.top + 8 || box.bottom > frame.bottom - 8) {
      this.node.scrollTop += box.top - frame.top - Math.min(60, frame.height / 3);
    }
    this._near();
  }

  _click(e) {
    const at = e.target.at;
    if (at && this.on.pick) this.on.pick(at[0], at[1]);
  }
}

// What is known of a token, or of a segment where none is chosen.
function inspector(run, segment, token, seen, pick) {
  if (!segment) {
    const what = 'Choose a token: who wrote it, how sure the model was, and what it can see.';
    return el('div', { class: 'inspector empty' }, el('p', {}, what));
  }
  const thread = run.threads.get(segment.thread), rows = [];
  const row = (name, ...value) => rows.push(el('div', { class: 'fact' }, el('dt', {}, name), el('dd', {}, ...value)));
  const node = el('div', { class: 'inspector' });
  if (token !== null) node.append(tokenHead(run, segment, token));
  else node.append(el('h3', {}, `${run.title(thread)}`, el('small', {}, run.label(thread))));
  row('segment', el('code', {}, segment.id));
  if (token !== null && segment.positions) row('position', (segment.positions[0] + token).toLocaleString('en'));
  if (token !== null && segment.steps && !segment.inserted(token)) {
    row('step', (segment.steps[0] + token - segment.forced.length + 1).toLocaleString('en'));
  }
  const n = token === null ? -1 : token - segment.forced.length;
  if (n >= 0 && segment.times().length > n) row('at', seconds(segment.times()[n]));
  if (token === null) {
    row('tokens', `${segment.sampled.length} sampled, ${segment.forced.length} inserted`);
    row('time', `${seconds(segment.t[0])} to ${seconds(segment.t[1])}`);
    if (segment.sampled.length) row('first tokens', `after ${seconds(segment.first - segment.t[0])}`);
  }
  if (segment.joins.length) row('joins', `${count(segment.joins.length, 'thread')} by ${segment.join}`);
  row('ended', segment.stop ? STOPS[segment.stop] || segment.stop : 'still at work');
  if (segment.note) row('note', segment.note);
  if (run.derived) row('path', segment.critical ? 'on the critical path' : 'beside the critical path');
  node.append(el('dl', {}, rows));
  if (seen) node.append(sight(run, seen, pick));
  return node;
}

function tokenHead(run, segment, token) {
  const id = segment.token(token), p = segment.logprob(token);
  const shown = run.text(id).replace(/\n/g, '\u21b5').replace(/ /g, '\u2423') || '(empty)';
  const by = segment.inserted(token) ? 'inserted by the runtime' : 'sampled by the model';
  const who = el('div', { class: 'who' }, el('p', {}, by, el('small', {}, `id ${run.idOf(id)}`)));
  if (p !== null) who.append(run.weighed ? chance(p) : el('p', { class: 'dim' }, 'probabilities were not logged'));
  return el('div', { class: 'about' }, el('div', { class: 'token' }, shown), who);
}

// A log-probability as what it means.
function chance(p) {
  const share = Math.exp(p), bar = el('i', {});
  bar.style.width = `${(share * 100).toFixed(1)}%`;
  return el('div', { class: 'chance' }, el('span', { class: 'track' }, bar),
    el('span', {}, share > 0.9995 ? '> 99.9 %' : `${(share * 100).toFixed(1)} %`),
    el('small', {}, `logprob ${p.toFixed(p > -0.01 ? 5 : 3)}`));
}

// What a token attends to, by thread; the others it cannot see.
function sight(run, seen, pick) {
  const threads = new Map();
  let total = 0, all = 0;
  for (const s of run.segments.values()) {
    const n = seen.get(s) || 0;
    total += n;
    all += s.length;
    const thread = run.threads.get(s.thread), entry = threads.get(thread) || [0, 0, s];
    threads.set(thread, [entry[0] + n, entry[1] + s.length, entry[2]]);
  }
  const chips = (visible) => {
    const list = [...threads].filter(([, [n]]) => (n > 0) === visible);
    const shown = list.slice(0, 24).map(([thread, [n, size, s]]) => el('button', {
      class: visible ? 'chip' : 'chip off', title: run.label(thread), onclick: () => pick(s, null),
    }, run.title(thread), el('small', {}, visible && n < size ? `${n} of ${size}` : String(size))));
    if (list.length > 24) shown.push(el('span', { class: 'dim' }, `and ${list.length - 24} more`));
    return shown;
  };
  const blind = chips(false);
  return el('div', { class: 'sight' },
    el('h4', {}, `attends to ${total.toLocaleString('en')} of ${all.toLocaleString('en')} tokens`),
    el('div', { class: 'chips' }, chips(true)),
    blind.length ? [el('h4', {}, 'cannot see'), el('div', { class: 'chips' }, blind)] : null);
}
