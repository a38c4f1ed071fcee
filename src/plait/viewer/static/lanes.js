// The threads of a run as lanes on one of three axes, drawn on a canvas: only what is in view, so size costs little.

const AXES = {
  time: { name: 'Time', about: 'seconds since the run started' },
  steps: { name: 'Steps', about: 'tokens on an engine with room for every thread: the length is the critical path' },
  positions: { name: 'Positions', about: 'where tokens stand in their context; what the runtime inserted counts' },
};
const RULER = 26;
const GAP = 5;
const SMALLEST_ROW = 9, LARGEST_ROW = 36;
// More threads than this read better side by side than one below the other.
const MANY = 14;

class Lanes {
  // on: {pick(segment, token), hover(segment, token, x, y), fold()}
  constructor(run, on = {}, options = {}) {
    this.run = run;
    this.on = on;
    this.axis = options.axis || (run.derived ? 'steps' : 'time');
    this.horizon = options.horizon || 0;
    this.most = options.most || 0.46;
    this.clock = null;
    this.folded = new Set();
    this.packed = false;
    this.chosen = false;
    this.selected = null;
    this.token = null;
    this.seen = null;
    this.scroll = 0;
    this.canvas = el('canvas', {
      class: 'lanes', tabindex: 0, role: 'application',
      'aria-label': 'Lanes of threads. Arrow keys choose, W and S zoom, A and D move, 0 shows all, F folds.',
    });
    this.context = this.canvas.getContext('2d');
    this._listen();
    this.observer = new ResizeObserver(() => {
      const box = this.canvas.parentElement;
      if (box && box.clientWidth !== this.width) this.resize();
    });
    this.fit();
  }

  attach(box) {
    box.append(this.canvas);
    this.observer.observe(box);
    this.resize();
  }

  close() {
    this.observer.disconnect();
    cancelAnimationFrame(this._frame);
  }

  // Layout ---------------------------------------------------------------------------------------------------------

  // Lanes from the top: `{threads, segments}`. Packed, the blocks of a thread follow each other on the same lanes.
  rows() {
    if (this._rows && this._size === this.run.segments.size) return this._rows;
    if (!this.chosen) this.packed = this.run.threads.size > MANY;
    this._rows = [];
    this._at = new Map();
    this._size = this.run.segments.size;
    for (const thread of this.run.order()) if (!thread.up) this._lay(thread, this._rows.length);
    for (const row of this._rows) row.segments = row.threads.flatMap((thread) => thread.segments);
    return this._rows;
  }

  // Puts a thread and all it forked on lanes from `row`; the lane after them.
  _lay(thread, row) {
    while (this._rows.length <= row) this._rows.push({ threads: [], segments: [] });
    this._rows[row].threads.push(thread);
    this._at.set(thread, row);
    if (this.folded.has(thread)) return row + 1;
    let end = row + 1, next = row + 1, block = null, until = [];
    for (const child of thread.children) {
      const name = child.name.slice(0, child.name.lastIndexOf('.'));
      if (this.packed) {
        const extent = this.run.extent(child);
        // Not where threads run beside their parent, so that blocks overlap.
        if (name !== block && extent.every(([start], k) => start >= (until[k] ?? 0) - 1e-9)) next = row + 1;
        until = extent.map(([, stop], k) => Math.max(stop, until[k] ?? 0));
      }
      block = name;
      next = this._lay(child, next);
      end = Math.max(end, next);
    }
    return end;
  }

  pack(packed) {
    this.packed = packed;
    this.chosen = true;
    this._rows = null;
    this.resize();
  }

  fold(thread) {
    if (!thread || !thread.children.length) return;
    if (!this.folded.delete(thread)) this.folded.add(thread);
    this._rows = null;
    this.resize();
  }

  setAxis(axis) {
    if (axis !== 'time' && !this.run.derived) return;
    this.axis = axis;
    this.fit();
  }

  from(s) { return this.axis === 'time' ? s.t[0] : this.axis === 'steps' ? s.steps[0] : s.positions[0]; }

  to(s) {
    if (this.axis !== 'time') return this.axis === 'steps' ? s.steps[1] : s.positions[1];
    return s.stop === null && this.clock !== null && !this.run.finished ? Math.max(s.t[1], this.clock) : s.t[1];
  }

  // Where a token of a segment stands on the axis: [from, to].
  place(s, i) {
    const n = i - s.forced.length;
    if (this.axis === 'positions') return [s.positions[0] + i, s.positions[0] + i + 1];
    if (n < 0) return [this.from(s), this.from(s)];
    if (this.axis === 'steps') return [s.steps[0] + n, s.steps[0] + n + 1];
    const times = s.times();
    return [n ? times[n - 1] : Math.max(s.t[0], times[0] - this._typical(s)), times[n]];
  }

  _typical(s) {
    const times = s.times();
    return times.length > 1 ? (times[times.length - 1] - times[0]) / (times.length - 1) : 0;
  }

  end() {
    if (this.axis === 'time') return Math.max(this.horizon, this.run.wall) || 1e-3;
    if (this._endOf !== this.axis) {
      this._endOf = this.axis;
      this._end = 1;
      for (const s of this.run.segments.values()) this._end = Math.max(this._end, this.to(s));
    }
    return this._end;
  }

  fit() {
    this.view = [0, this.end()];
    this.whole = true;
    this.draw();
  }

  // Fits the canvas to its box and the lanes; whether that changed, and so was drawn.
  resize() {
    const box = this.canvas.parentElement;
    if (!box || !box.clientWidth) return false;
    this._drawn = this.run.threads.size;
    this.width = Math.max(200, box.clientWidth);
    const rows = this.rows().length;
    this.gutter = this.width < 560 ? 68 : this.packed ? 76 : 148;
    const room = Math.max(150, window.innerHeight * this.most) - RULER - 10;
    this.row = clamp(SMALLEST_ROW, Math.floor(room / Math.max(1, rows)), LARGEST_ROW);
    this.height = RULER + 10 + Math.max(this.row, Math.min(rows * this.row, Math.floor(room / this.row) * this.row));
    const ratio = window.devicePixelRatio || 1, size = [this.width, this.height, this.row, this.gutter, ratio].join();
    if (size === this._fitted) {
      this.draw();
      return false;
    }
    this._fitted = size;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.scroll = clamp(0, this.scroll, this.scrollable());
    this.paint();
    return true;
  }

  scrollable() { return Math.max(0, this.rows().length * this.row + RULER + 10 - this.height); }

  x(value) {
    const [a, b] = this.view;
    return this.gutter + (value - a) / (b - a) * (this.width - this.gutter - 14);
  }

  value(x) {
    const [a, b] = this.view;
    return a + (x - this.gutter) / (this.width - this.gutter - 14) * (b - a);
  }

  y(row) { return RULER + row * this.row - this.scroll; }

  // Drawing --------------------------------------------------------------------------------------------------------

  draw() {
    if (this._frame || !this.width) return;
    this._frame = requestAnimationFrame(() => { this._frame = 0; this.paint(); });
  }

  paint() {
    const c = this.context;
    if (!this.width) return;
    if (this._drawn !== this.run.threads.size && this.resize()) return;
    if (this.whole) this.view = [0, this.end()];
    c.clearRect(0, 0, this.width, this.height);
    c.textBaseline = 'middle';
    this.font = `${Math.min(12.5, this.row * 0.42)}px ${palette.mono}`;
    c.font = this.font;
    this.em = c.measureText('0').width;
    this._ruler(c);
    const rows = this.rows();
    const first = Math.max(0, Math.floor(this.scroll / this.row));
    const last = Math.min(rows.length, Math.ceil((this.scroll + this.height - RULER) / this.row));
    c.save();
    c.beginPath();
    c.rect(0, RULER, this.width, this.height - RULER);
    c.clip();
    if (!this.packed) for (let i = first; i < last; i++) this._ground(c, rows[i], i);
    c.save();
    c.beginPath();
    c.rect(this.gutter - 6, RULER, this.width, this.height);
    c.clip();
    this._late = [];
    // Joins of threads below what is in view still reach up into it.
    for (let i = first; i < Math.min(rows.length, last + 40); i++) {
      for (const thread of rows[i].threads) if (this._near(thread)) this._links(c, thread, i);
    }
    for (const curve of this._late) this._curve(c, ...curve);
    for (let i = first; i < last; i++) this._bars(c, rows[i], i);
    c.restore();
    for (let i = first; i < last; i++) this._name(c, rows[i], i);
    c.restore();
    this._marker(c);
    if (this.scrollable()) this._scrollbar(c);
  }

  _ruler(c) {
    const end = this.view;
    c.font = `11px ${palette.sans}`;
    c.fillStyle = palette.dim;
    c.textAlign = 'center';
    for (const tick of ticks(end[0], end[1], (this.width - this.gutter) / 110, this.axis !== 'time')) {
      const x = Math.round(this.x(tick)) + 0.5;
      if (x < this.gutter - 1) continue;
      c.fillStyle = palette.line;
      c.globalAlpha = 0.6;
      c.fillRect(x - 0.5, RULER - 4, 1, this.height);
      c.globalAlpha = 1;
      c.fillStyle = palette.dim;
      const label = this.axis === 'time' ? seconds(tick) : tick.toLocaleString('en');
      c.fillText(label, clamp(this.gutter + 8, x, this.width - 22), 10);
    }
    c.textAlign = 'left';
    c.fillText(this.axis === 'time' ? 'time' : this.axis, 2, 10);
    c.font = this.font;
  }

  _ground(c, row, i) {
    if (this.selected && row.threads.includes(this.run.threads.get(this.selected.thread))) {
      c.fillStyle = palette.select;
      c.fillRect(0, this.y(i), this.width, this.row);
    }
  }

  _name(c, row, i) {
    const thread = row.threads[0];
    if (this.row < 12) {
      if (this.row < 9 || i % 2) return;
    }
    const y = this.y(i) + this.row / 2, indent = Math.min(thread.depth, 6) * (this.gutter > 100 ? 10 : 4);
    c.textAlign = 'left';
    let x = 2 + indent;
    if (thread.children.length && this.row >= 12 && row.threads.length === 1) {
      c.fillStyle = palette.dim;
      const folded = this.folded.has(thread);
      c.beginPath();
      if (folded) { c.moveTo(x, y - 4); c.lineTo(x + 5, y); c.lineTo(x, y + 4); }
      else { c.moveTo(x - 1, y - 2); c.lineTo(x + 7, y - 2); c.lineTo(x + 3, y + 3); }
      c.fill();
    }
    x += 12;
    const label = row.threads.length === 1 ? this.run.label(thread) : '', room = this.gutter - x - 12;
    c.font = `${this.row < 16 ? 9 : 12}px ${palette.sans}`;
    const alone = row.threads.length === 1;
    const here = !thread.up ? 'root' : alone || !this.packed ? String(this.run.number(thread)) : `\u00d7${row.threads.length.toLocaleString('en')}`;
    c.fillStyle = palette.dim;
    c.fillText(here, x, y + 0.5);
    const used = c.measureText(here).width + 6;
    c.fillStyle = palette.text;
    c.font = `${this.row < 16 ? 9 : 12}px ${palette.mono}`;
    if (label && room > used) c.fillText(cut(label, (room - used) / c.measureText('0').width), x + used, y + 0.5);
    if (this.folded.has(thread)) {
      c.fillStyle = palette.dim;
      c.fillText(`+${descendants(thread)}`, x + used, y + 0.5);
    }
    c.font = this.font;
  }

  // Lines of a lane: waiting for threads, waiting to be joined, the fork it came from, the join it goes to.
  _links(c, thread, i) {
    const y = this.y(i) + this.row / 2;
    const segments = thread.segments;
    for (const s of segments) {
      if (!this._began(s)) break;
      const x = this.x(this.from(s));
      if (x < this.gutter - 20 && this.x(this.to(s)) < this.gutter - 20) continue;
      if (segments.length > 1 && x > this.width && s.parent && this.x(this.to(this.run.segments.get(s.parent))) > this.width) break;
      const parent = s.parent === null ? null : this.run.segments.get(s.parent);
      if (parent && parent.thread === s.thread && s.joins.length) {
        this._wait(c, this.x(this.to(parent)), x, y);
      } else if (parent && parent.thread !== s.thread) {
        const forked = this.x(this.to(parent));
        this._curve(c, forked, this._rowOf(parent), x, y, follows(parent, s), true, s);
        if (x > forked + 3 * GAP) this._wait(c, forked, x, y);
      }
    }
    const last = segments[segments.length - 1], joiners = this.run.joiners(thread).filter((s) => this._began(s));
    const from = this.x(this.to(last));
    let until = from;
    for (const joiner of joiners) {
      const to = this.x(this.from(joiner));
      this._curve(c, to, this._rowOf(joiner), to, y, follows(last, joiner), false, last);
      until = Math.max(until, to);
    }
    if (joiners.length) {
      if (until - from > 2 * GAP + 2) this._wait(c, from, until - GAP, y, true);
    } else if (thread.up && last.stop !== null && !this.run.finished && this.clock !== null) {
      this._wait(c, this.x(this.to(last)), this.x(Math.min(this.clock, this.end())), y, true);
    }
  }

  _began(s) { return this.clock === null || this.axis !== 'time' || s.t[0] <= this.clock; }

  // Whether a thread, from its fork to its join, is in view and wide enough for its lines.
  _near(thread) {
    const segments = thread.segments, joiners = this.run.joiners(thread);
    let to = this.x(this.to(segments[segments.length - 1]));
    for (const s of joiners) to = Math.max(to, this.x(this.from(s)));
    const from = this.x(this.from(segments[0]));
    return to >= this.gutter - 20 && from <= this.width && (to - from > 5 || !joiners.length);
  }

  _rowOf(s) {
    const row = this._at.get(this.run.threads.get(s.thread));
    return row === undefined ? null : this.y(row) + this.row / 2;
  }

  _wait(c, from, to, y, quiet) {
    if (to - from < 2) return;
    c.strokeStyle = quiet ? palette.faint : palette.dim;
    c.lineWidth = 1;
    c.setLineDash(quiet ? [1, 4] : [2, 3]);
    c.beginPath();
    c.moveTo(from + (quiet ? 2 : GAP), Math.round(y) + 0.5);
    c.lineTo(to - GAP, Math.round(y) + 0.5);
    c.stroke();
    c.setLineDash([]);
  }

  _curve(c, x0, y0, x, y, critical, fork, segment, late = false) {
    if (y0 === null) return;
    if (critical && !late) {
      // On top of those beside it.
      this._late.push([x0, y0, x, y, critical, fork, segment, true]);
      return;
    }
    const r = Math.min(GAP, Math.abs(y - y0) / 2);
    const dimmed = this.seen && !this.seen.has(segment);
    c.globalAlpha = dimmed ? 0.25 : 1;
    c.strokeStyle = critical ? palette.accent : palette.thread;
    c.lineWidth = critical ? 2 : 1.25;
    c.beginPath();
    if (fork) {
      c.moveTo(x0 - r, y0);
      c.quadraticCurveTo(x0, y0, x0, y0 + r);
      c.lineTo(x0, y - r);
      c.quadraticCurveTo(x0, y, x0 + r, y);
      if (x > x0 + 1 && x <= x0 + 3 * GAP) c.lineTo(x + r, y);
    } else {
      const down = Math.sign(y - y0) * r;
      c.moveTo(x - r, y);
      c.quadraticCurveTo(x, y, x, y - down);
      c.lineTo(x, y0 + down);
      c.quadraticCurveTo(x, y0, x + r, y0);
    }
    c.stroke();
    c.globalAlpha = 1;
  }

  _bars(c, row, i) {
    const top = this.y(i), pad = this.row >= 24 ? 5 : this.row >= 14 ? 3 : 1;
    const h = this.row - 2 * pad;
    let drawn = -Infinity;
    for (const s of row.segments) {
      if (!this._began(s)) continue;
      let from = this.x(this.from(s)), to = this.x(this.to(s));
      if (this.clock !== null && this.axis === 'time') to = Math.min(to, this.x(this.clock));
      if (to < this.gutter - 20 || from > this.width) continue;
      if (to - from > 4 * GAP) { from += GAP; to -= GAP; } else if (to - from > 6) { from += 1.5; to -= 1.5; }
      to = Math.max(to, from + 1.5);
      if (to < drawn + 0.4) continue;
      drawn = to;
      this._bar(c, s, from, to, top + pad, h);
    }
  }

  _bar(c, s, from, to, y, h) {
    const critical = s.critical, r = Math.min(5, h / 2, (to - from) / 2);
    const picked = this.selected === s;
    c.globalAlpha = this.seen && !this.seen.has(s) ? 0.22 : 1;
    if (s.stop === 'forced' && !s.sampled.length) {
      c.strokeStyle = palette.dim;
      c.lineWidth = 1.25;
      c.strokeRect(from + 0.5, y + h / 2 - 3, Math.min(6, Math.max(3, to - from)), 6);
      c.globalAlpha = 1;
      return;
    }
    c.beginPath();
    c.roundRect(from, y, to - from, h, r);
    const small = to - from < 8 || h < 9;
    c.fillStyle = small ? (critical ? palette.accent : palette.thread) : critical ? palette['accent-soft'] : palette['thread-soft'];
    c.fill();
    if (!small || picked) {
      c.strokeStyle = s.stop === 'cancelled' ? palette.bad : critical ? palette.accent : palette.thread;
      c.lineWidth = picked ? 2.5 : critical ? 2 : 1;
      if (picked) c.strokeStyle = palette.text;
      if (s.stop === 'cancelled') c.setLineDash([4, 3]);
      c.stroke();
      c.setLineDash([]);
    }
    if (to - from > 10) {
      c.save();
      c.beginPath();
      c.roundRect(from, y, to - from, h, r);
      c.clip();
      this._given(c, s, from, to, y, h);
      if (h >= 9 && to - from > 14) this._words(c, s, from, to, y, h);
      c.restore();
    }
    if (BROKEN.has(s.stop) && h >= 8) {
      if (s === this.run.threads.get(s.thread).segments.at(-1)) this._broken(c, s, to + 3, y + h / 2);
      else if (to - from > 4) {
        c.fillStyle = palette.bad;
        c.fillRect(from + 3, y + h - 1, to - from - 6, 2);
      }
    }
    c.globalAlpha = 1;
  }

  // What is not sampled: inserted tokens on the axis of positions, the wait for the first token on that of time.
  _given(c, s, from, to, y, h) {
    let end = from;
    if (this.axis === 'positions') end = this.x(s.positions[0] + s.forced.length);
    else if (this.axis === 'time' && s.sampled.length) end = this.x(this.place(s, s.forced.length)[0]);
    else if (this.axis === 'time') end = to;
    if (end - from < 2) return;
    c.fillStyle = palette.panel;
    c.globalAlpha *= 0.62;
    c.fillRect(from, y, Math.min(end, to) - from, h);
    c.globalAlpha /= 0.62;
    c.strokeStyle = palette.hatch;
    c.lineWidth = 1;
    c.save();
    c.beginPath();
    c.rect(from, y, Math.min(end, to) - from, h);
    c.clip();
    c.beginPath();
    for (let x = Math.max(from, this.gutter) - h; x < Math.min(end, to, this.width); x += 5) {
      c.moveTo(x, y + h);
      c.lineTo(x + h, y);
    }
    c.stroke();
    c.restore();
  }

  _words(c, s, from, to, y, h) {
    const middle = y + h / 2 + 0.5;
    c.fillStyle = s.critical ? palette['on-accent'] : palette['on-thread'];
    const wide = this.axis === 'time' && s.sampled.length < 2 ? 0 : (this.x(this.to(s)) - this.x(this.from(s))) / s.length;
    if (wide > this.em * (this._letters(s) + 0.5)) return this._tokens(c, s, from, to, y, h);
    let start = from + 6;
    if (this.axis === 'time' && s.sampled.length) start = Math.max(start, this.x(this.place(s, s.forced.length)[0]) + 4);
    if (this.axis === 'positions') start = Math.max(start, this.x(s.positions[0] + s.forced.length) + 4);
    start = Math.max(start, this.gutter + 2);
    const most = Math.floor((to - start - 5) / this.em);
    if (most < 3) return;
    let text = this.packed && s.number === 0 ? this.run.label(this.run.threads.get(s.thread)) : '';
    if (text) text += '  ';
    const n = Math.max(0, this.run.shown(s, this.clock) - s.forced.length);
    for (let i = 0; i < n && text.length <= most + 12; i++) {
      text += this.run.control(s.sampled[i]) ? ' ' : this.run.text(s.sampled[i]);
    }
    c.fillText(cut(text.trim().replace(/\s+/g, ' '), most), start, middle);
  }

  // Letters of a typical longer token: one a cell is read where these fit.
  _letters(s) {
    if (this.axis === 'time' && s.sampled.length < 2) return Infinity;
    let sum = 0, n = 0;
    for (const id of s.sampled.slice(0, 60)) if (!this.run.control(id)) { sum += this.run.text(id).trim().length; n++; }
    return Math.max(1.1, 1.25 * sum / Math.max(1, n));
  }

  _tokens(c, s, from, to, y, h) {
    const first = this.axis === 'positions' ? 0 : s.forced.length, shown = this.run.shown(s, this.clock);
    const middle = y + h / 2 + 0.5;
    c.textAlign = 'center';
    for (let i = first; i < shown; i++) {
      const [a, b] = this.place(s, i);
      const xa = this.x(a), xb = this.x(b);
      if (xb < this.gutter || xa > this.width) continue;
      const on = this.token === i && this.selected === s;
      if (on) { c.fillStyle = palette.bg; c.fillRect(xa, y, xb - xa, h); }
      c.fillStyle = on ? palette.text : s.inserted(i) ? palette.dim : s.critical ? palette['on-accent'] : palette['on-thread'];
      const text = this.run.control(s.token(i)) ? '\u25c7' : this.run.text(s.token(i)).replace(/\n/g, '\u21b5');
      c.fillText(cut(this.run.spelled ? text : text.trim(), (xb - xa) / this.em), (xa + xb) / 2, middle);
    }
    c.textAlign = 'left';
  }

  _broken(c, s, x, y) {
    c.strokeStyle = palette.bad;
    c.lineWidth = 1.75;
    c.beginPath();
    if (s.stop === 'cancelled') {
      c.moveTo(x, y - 3.5); c.lineTo(x + 7, y + 3.5); c.moveTo(x + 7, y - 3.5); c.lineTo(x, y + 3.5);
    } else {
      c.moveTo(x + 3, y - 4); c.lineTo(x + 3, y + 1); c.moveTo(x + 3, y + 3.2); c.lineTo(x + 3, y + 4.4);
    }
    c.stroke();
  }

  _marker(c) {
    const at = this.clock !== null && this.axis === 'time' ? this.clock : null;
    if (at !== null) {
      const x = this.x(Math.min(at, this.view[1]));
      c.fillStyle = palette.text;
      c.fillRect(x - 0.5, 2, 1, this.height);
      c.beginPath();
      c.moveTo(x - 4, RULER - 8); c.lineTo(x + 4, RULER - 8); c.lineTo(x, RULER - 2);
      c.fill();
    } else if (this.cursor !== undefined && this.cursor > this.gutter) {
      c.fillStyle = palette.dim;
      c.globalAlpha = 0.5;
      c.fillRect(Math.round(this.cursor), RULER - 4, 1, this.height);
      c.globalAlpha = 1;
    }
  }

  _scrollbar(c) {
    const all = this.rows().length * this.row, room = this.height - RULER;
    c.fillStyle = palette.faint;
    c.globalAlpha = 0.7;
    c.beginPath();
    c.roundRect(this.width - 6, RULER + this.scroll / all * room, 4, Math.max(18, room / all * room), 2);
    c.fill();
    c.globalAlpha = 1;
  }

  // Hands ----------------------------------------------------------------------------------------------------------

  hit(x, y) {
    const rows = this.rows();
    const row = rows[Math.floor((y - RULER + this.scroll) / this.row)];
    if (y < RULER || !row) return null;
    if (x < this.gutter - 6) return { thread: row.threads[0], gutter: true };
    const value = this.value(x), slack = this.value(x + 3) - value;
    let best = null, distance = Infinity;
    for (const s of row.segments) {
      if (!this._began(s)) continue;
      const away = Math.max(this.from(s) - value, value - this.to(s), 0);
      if (away < distance) { best = s; distance = away; }
    }
    const thread = best ? this.run.threads.get(best.thread) : row.threads[0];
    if (!best || distance > slack) return { thread };
    let token = null;
    for (let i = 0; i < best.length; i++) {
      const [a, b] = this.place(best, i);
      if (a <= value && value < b) { token = i; break; }
    }
    return { thread, segment: best, token };
  }

  zoom(factor, x) {
    const at = this.value(x ?? (this.gutter + this.width) / 2), end = this.end();
    const least = this.axis === 'time' ? 1e-5 : 4;
    const width = clamp(Math.min(least, end), (this.view[1] - this.view[0]) * factor, end);
    const share = (at - this.view[0]) / (this.view[1] - this.view[0]);
    this._show(at - share * width, width, end);
  }

  pan(share) {
    const width = this.view[1] - this.view[0];
    this._show(this.view[0] + share * width, width, this.end());
  }

  _show(from, width, end) {
    const start = clamp(0, from, Math.max(0, end - width));
    this.view = [start, start + width];
    this.whole = width >= end * 0.9999;
    this.draw();
  }

  reveal(s, token = null) {
    const row = this._at && this._at.get(this.run.threads.get(s.thread));
    if (row !== undefined && this.width) {
      const top = row * this.row, room = this.height - RULER - this.row;
      if (top < this.scroll || top > this.scroll + room) this.scroll = clamp(0, top - room / 2, this.scrollable());
    }
    const [a, b] = token === null ? [this.from(s), this.to(s)] : this.place(s, token);
    const width = this.view[1] - this.view[0];
    if (b < this.view[0] || a > this.view[1]) this._show(a - width / 4, width, this.end());
    this.draw();
  }

  select(segment, token, seen) {
    this.selected = segment;
    this.token = token;
    this.seen = seen;
    if (segment) this.reveal(segment, token);
    this.draw();
  }

  _listen() {
    const canvas = this.canvas, at = (e) => {
      const box = canvas.getBoundingClientRect();
      return [e.clientX - box.left, e.clientY - box.top];
    };
    canvas.addEventListener('wheel', (e) => {
      const [x] = at(e);
      if (e.ctrlKey || e.metaKey || e.altKey) {
        this.zoom(Math.exp(clamp(-60, e.deltaY, 60) * 0.01), x);
      } else if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) {
        this.pan((e.deltaX || e.deltaY) / this.width);
      } else {
        const next = clamp(0, this.scroll + e.deltaY, this.scrollable());
        if (next === this.scroll) return;
        this.scroll = next;
        this.draw();
      }
      e.preventDefault();
    }, { passive: false });
    const down = new Map();
    let moved = false, apart = 0;
    canvas.addEventListener('pointerdown', (e) => {
      down.set(e.pointerId, at(e));
      moved = false;
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener('pointermove', (e) => {
      const [x, y] = at(e), before = down.get(e.pointerId);
      if (!before) {
        this.cursor = x;
        const hit = this.hit(x, y);
        canvas.style.cursor = hit && (hit.segment || hit.gutter) ? 'pointer' : 'default';
        if (this.on.hover) this.on.hover(hit, e.clientX, e.clientY);
        this.draw();
        return;
      }
      if (down.size === 2) {
        down.set(e.pointerId, [x, y]);
        const [p, q] = [...down.values()], now = Math.hypot(p[0] - q[0], p[1] - q[1]);
        if (apart) this.zoom(apart / Math.max(1, now), (p[0] + q[0]) / 2);
        apart = now;
        moved = true;
        return;
      }
      if (!moved && Math.abs(x - before[0]) + Math.abs(y - before[1]) < 4) return;
      moved = true;
      this.pan((before[0] - x) / (this.width - this.gutter));
      this.scroll = clamp(0, this.scroll + before[1] - y, this.scrollable());
      down.set(e.pointerId, [x, y]);
      this.draw();
    });
    const up = (e) => {
      const was = down.delete(e.pointerId);
      if (down.size < 2) apart = 0;
      if (!was || moved || e.type !== 'pointerup') return;
      const [x, y] = at(e), hit = this.hit(x, y);
      if (!hit) { if (this.on.pick) this.on.pick(null, null); return; }
      if (hit.gutter && hit.thread.children.length && x < 18 + Math.min(hit.thread.depth, 6) * 10) this.fold(hit.thread);
      else if (this.on.pick) this.on.pick(hit.segment || hit.thread.segments[0], hit.segment ? hit.token : null);
    };
    canvas.addEventListener('pointerup', up);
    canvas.addEventListener('pointercancel', up);
    canvas.addEventListener('pointerleave', () => {
      this.cursor = undefined;
      if (this.on.hover) this.on.hover(null);
      this.draw();
    });
    canvas.addEventListener('dblclick', (e) => {
      const hit = this.hit(...at(e));
      if (!hit || !hit.segment) {
        this.fit();
        return;
      }
      const a = this.from(hit.segment), b = this.to(hit.segment);
      this._show(a - (b - a) * 0.05, (b - a) * 1.1, this.end());
    });
  }

  // True where the key was for the lanes.
  key(e) {
    switch (e.key) {
      case 'w': case '=': case '+': this.zoom(0.7); return true;
      case 's': case '-': this.zoom(1 / 0.7); return true;
      case 'a': this.pan(-0.15); return true;
      case 'd': this.pan(0.15); return true;
      case '0': this.fit(); return true;
      case 'p': this.pack(!this.packed); return true;
      case 'f': this.fold(this.selected && this.run.threads.get(this.selected.thread)); return true;
      default: return false;
    }
  }
}

function cut(text, most) {
  const n = Math.floor(most);
  return text.length <= n ? text : n < 1 ? '' : n < 2 ? '\u00b7' : `${text.slice(0, n - 1)}\u2026`;
}

// Whether the critical path goes from one segment straight to another.
function follows(before, after) {
  return before.critical && after.critical && before.steps[1] === after.steps[0];
}

function descendants(thread) {
  return thread.children.reduce((n, child) => n + 1 + descendants(child), 0);
}
