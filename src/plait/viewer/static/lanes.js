// The threads of a run as strands that split and join, drawn on a canvas: only what is in view, so size costs little.
// A thread comes out of its parent's lane when it is forked; on a clock, bars and strands grow as the run did.

const SPLIT_MS = 420;
// Larger runs stand still.
const LIVELY = 200;
const still = matchMedia('(prefers-reduced-motion: reduce)');

class Lanes extends Plane {
  // on: {pick(segment, token), hover(hit, x, y), tick(clock)}; settled: threads that are there already do not come out
  constructor(run, on = {}, options = {}) {
    super(run, options);
    this.on = on;
    this.selected = null;
    this.token = null;
    this.seen = null;
    // Threads that have begun, and when each was first drawn, as long as it still moves.
    this.alive = new Set(options.settled ? run.threads.values() : []);
    this.born = new Map();
    this.canvas = el('canvas', {
      class: 'lanes', tabindex: 0, role: 'application',
      'aria-label': 'Lanes of threads. Arrow keys choose, W and S zoom, A and D move, 0 shows all, F folds.',
    });
    this.context = this.canvas.getContext('2d');
    hands(this);
    this.observer = new ResizeObserver(() => {
      const box = this.canvas.parentElement;
      if (box && box.clientWidth !== this.width) this.resize();
    });
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

  // Fits the canvas to its box and the lanes; whether that changed, and so was drawn.
  resize() {
    if (!this.measure(this.canvas.parentElement)) return false;
    this._drawn = this.run.threads.size;
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
    this.paint();
    return true;
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
    for (const other of this.run.threads.values()) if (within(other, thread)) this.alive.delete(other);
    this._rows = null;
    this.resize();
  }

  // Shows a run as it goes on: between its events the clock goes on by itself.
  follow() {
    this.heard = performance.now();
    this.draw();
  }

  select(segment, token, seen) {
    this.selected = segment;
    this.token = token;
    this.seen = seen;
    if (segment) this.reveal(segment, token);
    this.draw();
  }

  show(...where) {
    super.show(...where);
    this.draw();
  }

  // Frames --------------------------------------------------------------------------------------------------------------

  draw() {
    if (this._frame || !this.width) return;
    this._frame = requestAnimationFrame(() => { this._frame = 0; this.paint(); });
  }

  paint() {
    if (!this.width) return;
    if (this._drawn !== this.run.threads.size && this.resize()) return;
    this._pass();
    const c = this.context, rows = this.rows();
    c.clearRect(0, 0, this.width, this.height);
    c.textBaseline = 'middle';
    this.font = `${Math.min(12.5, this.row * 0.42)}px ${palette.mono}`;
    c.font = this.font;
    this.em = c.measureText('0').width;
    this._ruler(c);
    const first = Math.max(0, Math.floor(this.scroll / this.row));
    const last = Math.min(rows.length, Math.ceil((this.scroll + this.height - RULER) / this.row));
    const threads = [];
    // Joins of threads below what is in view still reach up into it.
    for (let i = first; i < Math.min(rows.length, last + 40); i++) threads.push(...rows[i].threads.filter((t) => this._near(t)));
    clipped(c, 0, RULER, this.width, this.height, () => {
      if (!this.packed) for (let i = first; i < last; i++) this._ground(c, rows[i], i);
      const until = this.clock !== null && this.axis === 'time' ? this.x(this.clock) : this.width;
      clipped(c, this.gutter - 6, RULER, Math.max(0, until - this.gutter + 6), this.height, () => {
        const strands = threads.flatMap((thread) => this._strands(thread));
        strands.sort((a, b) => a.critical - b.critical);
        for (const strand of strands) this._strand(c, strand);
        for (let i = first; i < last; i++) this._bars(c, rows[i]);
      });
      for (let i = first; i < last; i++) this._name(c, rows[i], i);
      if (this.clock !== null && this.axis === 'time') for (let i = first; i < last; i++) this._heads(c, rows[i]);
    });
    this._marker(c);
    if (this.scrollable()) this._scrollbar(c);
    if (this.born.size || this.before || this.heard) this.draw();
  }

  // What moved since the last frame: the clock, an axis that turns into another, threads that were forked.
  _pass() {
    const now = performance.now(), { run } = this;
    if (run.finished) this.heard = 0;
    if (this.heard) {
      this.clock = Math.max(this.clock || 0, run.wall + (now - this.heard) / 1000);
      if (this.on.tick) this.on.tick(this.clock);
    }
    if (this.whole && this.view[1] !== this.end()) this.show(0, this.end(), true);
    if (this.before) {
      this.before.share = ease((now - this.before.since) / TURN_MS);
      if (this.before.share === 1 || still.matches || run.threads.size > LIVELY) this.before = null;
    }
    if (this.packed || still.matches || run.threads.size > LIVELY) return this.born.clear();
    for (const thread of run.threads.values()) {
      if (!this.began(thread.segments[0])) this.alive.delete(thread);
      else if (!this.alive.has(thread)) {
        this.alive.add(thread);
        this.born.set(thread, now);
      }
    }
    this.out = new Map();
    for (const [thread, since] of this.born) {
      const share = ease((now - since) / SPLIT_MS);
      if (share === 1) this.born.delete(thread); else this.out.set(thread, share);
    }
  }

  // How far a thread has come out of its parent's lane: 0 at its fork, 1 soon after.
  _out(thread) { return thread.up && this.born.has(thread) ? this.out.get(thread) ?? 1 : 1; }

  // The middle of a thread's lane in pixels; null where it is folded away.
  _middle(thread) {
    const row = this.rowOf(thread);
    if (row === undefined) return null;
    const own = this.y(row) + this.row / 2, share = this._out(thread);
    return share === 1 ? own : mix(this._middle(thread.up), own, share);
  }

  // What stands on the lanes --------------------------------------------------------------------------------------------

  _ruler(c) {
    const [from, to] = this.view;
    c.font = `11px ${palette.sans}`;
    c.textAlign = 'center';
    for (const tick of ticks(from, to, (this.width - this.gutter) / 110, this.axis !== 'time')) {
      const x = Math.round(this.x(tick)) + 0.5;
      if (x < this.gutter - 1) continue;
      c.fillStyle = palette.line;
      c.globalAlpha = 0.6;
      c.fillRect(x - 0.5, RULER - 4, 1, this.height);
      c.globalAlpha = 1;
      c.fillStyle = palette.dim;
      c.fillText(this.axis === 'time' ? seconds(tick) : big(tick), clamp(this.gutter + 8, x, this.width - 22), 10);
    }
    c.textAlign = 'left';
    c.fillText(this.axis, 2, 10);
    c.font = this.font;
  }

  _ground(c, row, i) {
    if (!this.selected || !row.threads.includes(this.run.threads.get(this.selected.thread))) return;
    c.fillStyle = palette.select;
    c.fillRect(0, this.y(i), this.width, this.row);
  }

  _name(c, row, i) {
    const thread = row.threads[0], alone = row.threads.length === 1, middle = this._middle(thread);
    if (this.row < 12 && (this.row < 9 || i % 2)) return;
    const y = middle ?? this.y(i) + this.row / 2, size = this.row < 16 ? 9 : 12;
    let x = 2 + Math.min(thread.depth, 6) * (this.gutter > 100 ? 10 : 4);
    c.globalAlpha = alone && !this.began(thread.segments[0]) ? 0 : this._out(thread);
    c.textAlign = 'left';
    c.fillStyle = palette.dim;
    if (thread.children.length && this.row >= 12 && alone) {
      c.beginPath();
      if (this.folded.has(thread)) { c.moveTo(x, y - 4); c.lineTo(x + 5, y); c.lineTo(x, y + 4); }
      else { c.moveTo(x - 1, y - 2); c.lineTo(x + 7, y - 2); c.lineTo(x + 3, y + 3); }
      c.fill();
    }
    x += 12;
    const label = alone ? this.run.label(thread) : '', room = this.gutter - x - 12;
    const number = alone || !this.packed ? String(this.run.number(thread)) : `\u00d7${big(row.threads.length)}`;
    const here = thread.up ? number : 'root';
    c.font = `${size}px ${palette.sans}`;
    c.fillText(here, x, y + 0.5);
    const used = c.measureText(here).width + 6;
    c.font = `${size}px ${palette.mono}`;
    if (this.folded.has(thread)) {
      c.fillText(`+${descendants(thread)}`, x + used, y + 0.5);
    } else if (label && room > used) {
      c.fillStyle = palette.text;
      c.fillText(cut(label, (room - used) / c.measureText('0').width), x + used, y + 0.5);
    }
    c.font = this.font;
    c.globalAlpha = 1;
  }

  // Strands -------------------------------------------------------------------------------------------------------------

  // Whether a thread, from its fork to its join, is in view and wide enough for its strands.
  _near(thread) {
    const [a, b] = this.reach(thread), from = this.x(a), to = this.x(b);
    return to >= this.gutter - 20 && from <= this.width && (to - from > 5 || !this.run.joiners(thread).length);
  }

  // What leads into a thread's bars and out of them: the fork it came from, its waits, the joins that read it.
  // A strand goes from one point to another; straight ones are waits.
  _strands(thread) {
    const y = this._middle(thread), own = thread.segments, { run } = this, out = [];
    if (y === null || !this.began(own[0])) return out;
    const wait = (from, to, quiet) => {
      if (to - from > 3) out.push({ from: [from, y], to: [to, y], wait: true, quiet, critical: false, of: own[0] });
    };
    for (const s of own) {
      const parent = s.parent === null ? null : run.segments.get(s.parent), [start] = this.bar(s);
      if (!parent || (start < this.gutter - 40 && this.bar(s)[1] < this.gutter - 40)) continue;
      const [, end] = this.bar(parent), [, fork] = this.ends(parent);
      if (end > this.width) break;
      if (parent.thread !== s.thread) {
        const above = this._middle(run.threads.get(parent.thread)), bend = Math.min(start, fork + BEND);
        if (above !== null && bend >= end) out.push({ from: [end, above], to: [bend, y], critical: follows(parent, s), of: s });
        wait(bend, start, false);
      } else if (s.joins.length) wait(end, start, false);
    }
    const last = own[own.length - 1], [, end] = this.bar(last);
    let until = end;
    for (const joiner of run.joiners(thread)) {
      const at = this._middle(run.threads.get(joiner.thread)), [start] = this.bar(joiner);
      const bend = Math.max(end, this.ends(joiner)[0] - BEND);
      // On the axis of positions a parent may read its threads again where they began: nothing leads back.
      if (at === null || start < bend) continue;
      out.push({ from: [bend, y], to: [start, at], critical: follows(last, joiner), of: last });
      until = Math.max(until, bend);
    }
    wait(end, until, true);
    // A live run: what this thread waits for is not known yet, only that it waits.
    const waits = !run.finished && this.clock !== null && last.stop === 'stop' && until === end;
    if (waits) wait(end, this.x(this.clock), Boolean(thread.up && !last.forks));
    return out;
  }

  _strand(c, { from: [x0, y0], to: [x1, y1], wait, quiet, critical, of }) {
    c.globalAlpha = this.seen && !this.seen.has(of) ? 0.25 : 1;
    c.strokeStyle = wait ? (quiet ? palette.faint : palette.dim) : critical ? palette.accent : palette.thread;
    c.lineWidth = wait ? 1 : critical ? 2 : 1.25;
    if (wait) c.setLineDash(quiet ? [1, 4] : [2, 3]);
    c.beginPath();
    c.moveTo(x0, wait ? Math.round(y0) + 0.5 : y0);
    if (wait) c.lineTo(x1, Math.round(y1) + 0.5);
    else c.bezierCurveTo((x0 + x1) / 2, y0, (x0 + x1) / 2, y1, x1, y1);
    c.stroke();
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  // Bars ----------------------------------------------------------------------------------------------------------------

  _bars(c, row) {
    const pad = this.row >= 40 ? 7 : this.row >= 24 ? 5 : this.row >= 14 ? 3 : 1, h = this.row - 2 * pad;
    let drawn = -Infinity;
    for (const s of row.segments) {
      // One of several inside a pixel stands for all.
      if ((!this.before && this.x(this.to(s)) < Math.max(drawn + 0.4, this.gutter - 20)) || !this.began(s)) continue;
      const [from, to] = this.bar(s);
      if (to < this.gutter - 20 || from > this.width || to < drawn + 0.4) continue;
      drawn = to;
      const middle = this._middle(this.run.threads.get(s.thread));
      if (middle !== null) this._bar(c, s, from, to, middle - h / 2, h);
    }
  }

  _bar(c, s, from, to, y, h) {
    const critical = s.critical, r = Math.min(5, h / 2, (to - from) / 2), picked = this.selected === s;
    c.globalAlpha = this.seen && !this.seen.has(s) ? 0.22 : 1;
    if (s.stop === 'forced' && !s.sampled.length) {
      c.strokeStyle = palette.dim;
      c.lineWidth = 1.25;
      c.strokeRect(from + 0.5, y + h / 2 - 3, Math.min(6, Math.max(3, to - from)), 6);
      c.globalAlpha = 1;
      return;
    }
    const small = to - from < 8 || h < 9;
    c.beginPath();
    c.roundRect(from, y, to - from, h, r);
    c.fillStyle = palette[(critical ? 'accent' : 'thread') + (small ? '' : '-soft')];
    c.fill();
    if (!small) {
      clipped(c, from, y, to - from, h, () => {
        this._given(c, s, from, to, y, h);
        if (to - from > 14) this._words(c, s, from, to, y, h);
      }, r);
    }
    if (!small || picked) {
      c.beginPath();
      c.roundRect(from, y, to - from, h, r);
      c.strokeStyle = picked ? palette.text : s.stop === 'cancelled' ? palette.bad : critical ? palette.accent : palette.thread;
      c.lineWidth = picked ? 2.5 : critical ? 2 : 1;
      if (s.stop === 'cancelled') c.setLineDash([4, 3]);
      c.stroke();
      c.setLineDash([]);
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
    if (this.axis === 'positions') end = this.inside(s)(s.positions[0] + s.forced.length);
    else if (this.axis === 'time') end = s.sampled.length ? this.inside(s)(this.place(s, s.forced.length)[0]) : to;
    end = Math.min(end, to);
    if (end - from < 2) return;
    const alpha = c.globalAlpha;
    c.fillStyle = palette.panel;
    c.globalAlpha = alpha * 0.62;
    c.fillRect(from, y, end - from, h);
    c.globalAlpha = alpha;
    c.strokeStyle = palette.hatch;
    c.lineWidth = 1;
    clipped(c, from, y, end - from, h, () => {
      c.beginPath();
      for (let x = Math.max(from, this.gutter) - h; x < Math.min(end, this.width); x += 5) {
        c.moveTo(x, y + h);
        c.lineTo(x + h, y);
      }
      c.stroke();
    });
  }

  // Token by token where these have room, else as a line of text.
  _words(c, s, from, to, y, h) {
    c.fillStyle = s.critical ? palette['on-accent'] : palette['on-thread'];
    const inside = this.inside(s), wide = (to - from) / Math.max(1, this.axis === 'positions' ? s.length : s.sampled.length);
    if (!this.before && wide > this.em * (this._letters(s) + 0.5)) return this._tokens(c, s, inside, y, h);
    let start = from + 6;
    if (this.axis === 'time' && s.sampled.length) start = Math.max(start, inside(this.place(s, s.forced.length)[0]) + 4);
    if (this.axis === 'positions') start = Math.max(start, inside(s.positions[0] + s.forced.length) + 4);
    start = Math.max(start, this.gutter + 2);
    const most = Math.floor((to - start - 5) / this.em);
    if (most < 3) return;
    let text = this.packed && s.number === 0 ? this.run.label(this.run.threads.get(s.thread)) : '';
    if (text) text += '  ';
    const n = Math.max(0, this.run.shown(s, this.clock) - s.forced.length);
    for (let i = 0; i < n && text.length <= most + 12; i++) {
      text += this.run.control(s.sampled[i]) ? ' ' : this.run.text(s.sampled[i]);
    }
    c.fillText(cut(text.trim().replace(/\s+/g, ' '), most), start, y + h / 2 + 0.5);
  }

  // Letters of a typical longer token: one a cell is read where these fit.
  _letters(s) {
    if (this.axis === 'time' && s.sampled.length < 2) return Infinity;
    let sum = 0, n = 0;
    for (const id of s.sampled.slice(0, 60)) if (!this.run.control(id)) { sum += this.run.text(id).trim().length; n++; }
    return Math.max(1.1, 1.25 * sum / Math.max(1, n));
  }

  _tokens(c, s, inside, y, h) {
    const first = this.axis === 'positions' ? 0 : s.forced.length, shown = this.run.shown(s, this.clock);
    c.textAlign = 'center';
    for (let i = first; i < shown; i++) {
      const [xa, xb] = this.place(s, i).map(inside);
      if (xb < this.gutter || xa > this.width) continue;
      const on = this.token === i && this.selected === s;
      if (on) { c.fillStyle = palette.bg; c.fillRect(xa, y, xb - xa, h); }
      c.fillStyle = on ? palette.text : s.inserted(i) ? palette.dim : s.critical ? palette['on-accent'] : palette['on-thread'];
      const text = this.run.control(s.token(i)) ? '\u25c7' : this.run.text(s.token(i)).replace(/\n/g, '\u21b5');
      c.fillText(cut(this.run.spelled ? text : text.trim(), (xb - xa) / this.em), (xa + xb) / 2, y + h / 2 + 0.5);
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

  // On top --------------------------------------------------------------------------------------------------------------

  // Where threads are at work at the clock.
  _heads(c, row) {
    for (const s of row.segments) {
      if (s.t[0] > this.clock || (s.stop !== null || this.run.finished ? s.t[1] <= this.clock : false)) continue;
      const y = this._middle(this.run.threads.get(s.thread)), x = this.x(this.clock);
      if (y === null || x > this.width) continue;
      c.fillStyle = s.critical || !this.run.finished ? palette.accent : palette.thread;
      c.beginPath();
      c.arc(x, y, 3.5, 0, 7);
      c.fill();
      c.globalAlpha = 0.2;
      c.beginPath();
      c.arc(x, y, 8, 0, 7);
      c.fill();
      c.globalAlpha = 1;
    }
  }

  _marker(c) {
    if (this.clock !== null && this.axis === 'time') {
      const x = this.x(Math.min(this.clock, this.view[1]));
      c.fillStyle = palette.text;
      c.globalAlpha = 0.5;
      c.fillRect(x - 0.5, 2, 1, this.height);
      c.globalAlpha = 1;
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
}

function clipped(c, x, y, w, h, work, r = 0) {
  c.save();
  c.beginPath();
  c.roundRect(x, y, w, h, r);
  c.clip();
  work();
  c.restore();
}

// From 0 to 1, quick at first.
const ease = (share) => (share >= 1 ? 1 : 1 - (1 - Math.max(0, share)) ** 3);

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

function within(thread, other) {
  for (let up = thread.up; up; up = up.up) if (up === other) return true;
  return false;
}
