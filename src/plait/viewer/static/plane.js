// Where the threads of a run stand: a lane for each from the top, and the ends of their segments on one of three axes.
// Knows what is in view and what is under a point; draws nothing.

const AXES = {
  time: { name: 'Time', about: 'Seconds since the run started' },
  steps: { name: 'Steps', about: 'One token a step, with room for every thread: how long the run is at best' },
  positions: { name: 'Positions', about: 'Where each token stands in its context, with what the runtime inserted' },
};
const RULER = 26;
// From a bar to the place of its fork or join: half of where strands bend.
const BEND = 12;
const SMALLEST_ROW = 9, LARGEST_ROW = 46;
// More threads than this read better side by side than one below the other.
const MANY = 14;
const TURN_MS = 420;

class Plane {
  constructor(run, options = {}) {
    this.run = run;
    this.axis = options.axis || (run.derived ? 'steps' : 'time');
    this.horizon = options.horizon || 0;
    this.most = options.most || 0.46;
    // Seconds up to which the run is shown; null shows all of it.
    this.clock = null;
    this.folded = new Set();
    this.packed = false;
    this.chosen = false;
    this.scroll = 0;
    this.width = 0;
    this.view = [0, this.end()];
    this.whole = true;
    this.before = null;
  }

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

  // The lane of a thread; undefined where it is folded away.
  rowOf(thread) {
    this.rows();
    return this._at.get(thread);
  }

  // On the axis --------------------------------------------------------------------------------------------------------

  from(s, axis = this.axis) { return axis === 'time' ? s.t[0] : axis === 'steps' ? s.steps[0] : s.positions[0]; }

  to(s, axis = this.axis) {
    if (axis !== 'time') return axis === 'steps' ? s.steps[1] : s.positions[1];
    return s.stop === null && this.clock !== null && !this.run.finished ? Math.max(s.t[1], this.clock) : s.t[1];
  }

  // Where a token of a segment stands: [from, to].
  place(s, i) {
    const n = i - s.forced.length;
    if (this.axis === 'positions') return [s.positions[0] + i, s.positions[0] + i + 1];
    if (n < 0) return [this.from(s), this.from(s)];
    if (this.axis === 'steps') return [s.steps[0] + n, s.steps[0] + n + 1];
    const times = s.times();
    return [n ? times[n - 1] : Math.max(s.t[0], times[0] - this._typical(times)), times[n]];
  }

  _typical(times) { return times.length > 1 ? (times[times.length - 1] - times[0]) / (times.length - 1) : 0; }

  end(axis = this.axis) {
    if (axis === 'time') {
      const { run } = this;
      return Math.max(this.horizon, run.finished ? run.wall : roomy(Math.max(run.wall, this.clock || 0))) || 1e-3;
    }
    if (this._endOf !== axis) {
      this._endOf = axis;
      this._end = 1;
      for (const s of this.run.segments.values()) this._end = Math.max(this._end, this.to(s, axis));
    }
    return this._end;
  }

  x(value, view = this.view) {
    return this.gutter + (value - view[0]) / (view[1] - view[0]) * (this.width - this.gutter - 14);
  }

  value(x) {
    const [a, b] = this.view;
    return a + (x - this.gutter) / (this.width - this.gutter - 14) * (b - a);
  }

  y(row) { return RULER + row * this.row - this.scroll; }

  // Both ends of a segment in pixels; on their way while one axis turns into another.
  ends(s) {
    const from = this.x(this.from(s)), to = this.x(this.to(s));
    if (!this.before) return [from, to];
    const { axis, view, share } = this.before;
    return [mix(this.x(this.from(s, axis), view), from, share), mix(this.x(this.to(s, axis), view), to, share)];
  }

  // A segment's bar: its ends, less the room in which its strands bend.
  bar(s) {
    let [from, to] = this.ends(s);
    const bend = clamp(0.75, (to - from) / 6, BEND);
    from += s.opens || s.joins.length ? bend : 0.75;
    to -= s.forks || s.joiners.length ? bend : 0.75;
    return [from, Math.max(to, from + 1.5)];
  }

  // From its fork to its last join: what of the axis a thread takes. Kept once the run does not change.
  reach(thread) {
    if (!this.run.finished) return this._reached(thread);
    if (this._reachOf !== this.axis) {
      this._reachOf = this.axis;
      this._reach = new Map();
    }
    let reach = this._reach.get(thread);
    if (!reach) this._reach.set(thread, reach = this._reached(thread));
    return reach;
  }

  _reached(thread) {
    const own = thread.segments, first = own[0], parent = first.opens && this.run.segments.get(first.parent);
    let from = this.from(first), to = this.to(own[own.length - 1]);
    if (parent) from = Math.min(from, this.to(parent));
    for (const s of this.run.joiners(thread)) to = Math.max(to, this.from(s));
    return [from, to];
  }

  // From a place on the axis to pixels inside a segment's bar, which is a little shorter than the segment.
  inside(s) {
    const [from, to] = this.bar(s), start = this.from(s), size = Math.max(1e-9, this.to(s) - start);
    return (value) => from + (value - start) / size * (to - from);
  }

  // What is in view -----------------------------------------------------------------------------------------------------

  // Fits width and height to a box; false where there is none yet.
  measure(box) {
    if (!box || !box.clientWidth) return false;
    this.width = Math.max(200, box.clientWidth);
    const rows = this.rows().length;
    this.gutter = this.width < 560 ? 68 : this.packed ? 76 : 148;
    const room = Math.max(150, window.innerHeight * this.most) - RULER - 10;
    this.row = clamp(SMALLEST_ROW, Math.floor(room / Math.max(1, rows)), LARGEST_ROW);
    this.height = RULER + 10 + Math.max(this.row, Math.min(rows * this.row, Math.floor(room / this.row) * this.row));
    this.scroll = clamp(0, this.scroll, this.scrollable());
    return true;
  }

  scrollable() { return Math.max(0, this.rows().length * this.row + RULER + 10 - this.height); }

  // Shows from one place on, as wide as said. `turning`: what stands there moves to its new place before our eyes.
  show(from, width, turning = false) {
    const end = this.end(), start = clamp(0, from, Math.max(0, end - width));
    if (turning) this.before = { axis: this.axis, view: this.view, since: performance.now(), share: 0 };
    this.view = [start, start + width];
    this.whole = width >= end * 0.9999;
  }

  setAxis(axis) {
    if (axis === this.axis || (axis !== 'time' && !this.run.derived)) return;
    const before = { axis: this.axis, view: this.view, since: performance.now(), share: 0 };
    this.axis = axis;
    this.show(0, this.end());
    this.before = before;
  }

  fit() { this.show(0, this.end(), true); }

  zoom(factor, x) {
    const at = this.value(x ?? (this.gutter + this.width) / 2), end = this.end();
    const least = this.axis === 'time' ? 1e-5 : 4;
    const width = clamp(Math.min(least, end), (this.view[1] - this.view[0]) * factor, end);
    this.show(at - (at - this.view[0]) / (this.view[1] - this.view[0]) * width, width);
  }

  pan(share) {
    const width = this.view[1] - this.view[0];
    this.show(this.view[0] + share * width, width);
  }

  // Brings a segment, or one of its tokens, into view.
  reveal(s, token = null) {
    const row = this.rowOf(this.run.threads.get(s.thread));
    if (row !== undefined && this.width) {
      const top = row * this.row, room = this.height - RULER - this.row;
      if (top < this.scroll || top > this.scroll + room) this.scroll = clamp(0, top - room / 2, this.scrollable());
    }
    const [a, b] = token === null ? [this.from(s), this.to(s)] : this.place(s, token);
    const width = this.view[1] - this.view[0];
    if (b < this.view[0] || a > this.view[1]) this.show(a - width / 4, width);
  }

  // What is under a point: `{thread, segment?, token?, gutter?}`, or null.
  hit(x, y) {
    const row = this.rows()[Math.floor((y - RULER + this.scroll) / this.row)];
    if (y < RULER || !row) return null;
    if (x < this.gutter - 6) return { thread: row.threads[0], gutter: true };
    let best = null, distance = Infinity;
    for (const s of row.segments) {
      if (!this.began(s)) continue;
      const [from, to] = this.ends(s), away = Math.max(from - x, x - to, 0);
      if (away < distance) { best = s; distance = away; }
    }
    const thread = best ? this.run.threads.get(best.thread) : row.threads[0];
    if (!best || distance > 3) return { thread };
    const inside = this.inside(best);
    let token = null;
    for (let i = 0; i < best.length; i++) {
      const [a, b] = this.place(best, i).map(inside);
      if (a <= x && x < b) { token = i; break; }
    }
    return { thread, segment: best, token };
  }

  // Whether a segment had begun at the clock.
  began(s) { return this.clock === null || this.axis !== 'time' || s.t[0] <= this.clock; }
}

// Seconds that hold a run which goes on: round, so that the axis rests.
function roomy(wall) {
  const power = 10 ** Math.floor(Math.log10(Math.max(wall * 1.05, 0.2)));
  return [1, 2.5, 5, 10].map((k) => k * power).find((s) => s >= wall * 1.05);
}

const mix = (a, b, share) => a + (b - a) * share;
