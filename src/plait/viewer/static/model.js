// A run as the views read it, from the values of `describe_run` or from live events. Draws nothing.
// Critical path, steps and positions are the tree's own and come as data; a live run has none until its end.

const BROKEN = new Set(['cancelled', 'malformed', 'budget', 'length']);
// Why a call ended, in words.
const STOPS = {
  stop: 'by a tag', eos: 'by itself', length: 'context is full', budget: 'limit reached',
  malformed: 'tags cannot be read', cancelled: 'cancelled', forced: 'closed by the runtime',
};

class Segment {
  constructor(about) {
    const colon = about.id.lastIndexOf(':');
    this.id = about.id;
    this.thread = about.id.slice(0, colon);
    this.number = Number(about.id.slice(colon + 1));
    this.parent = about.parent;
    this.joins = about.joins || [];
    this.join = about.join || 'none';
    this.keep = about.keep ?? null;
    this.forced = about.forced || [];
    this.sampled = about.sampled || [];
    this.logprobs = about.logprobs || [];
    this.chunks = about.chunks || [];
    this.t = about.t;
    this.steps = about.steps || null;
    this.positions = about.positions || null;
    this.critical = about.critical || false;
    this.stop = about.stop || null;
    this.note = about.note || '';
    this.joiners = [];
    // Whether it is the first of a forked thread; whether threads were forked at its end.
    this.opens = false;
    this.forks = false;
    this._times = null;
  }

  get length() { return this.forced.length + this.sampled.length; }

  token(i) { return i < this.forced.length ? this.forced[i] : this.sampled[i - this.forced.length]; }

  inserted(i) { return i < this.forced.length; }

  logprob(i) { return i < this.forced.length ? null : this.logprobs[i - this.forced.length]; }

  // Seconds at which each sampled token was there; the tokens of a chunk spread over the time since the one before.
  times() {
    if (this._times && this._times.length === this.sampled.length) return this._times;
    const times = [];
    let before = this.t[0];
    for (const [count, t] of this.chunks) {
      for (let i = 1; i <= count; i++) times.push(before + (t - before) * i / count);
      before = t;
    }
    return this._times = times;
  }

  get first() { return this.chunks.length ? this.chunks[0][1] : this.t[1]; }
}

class Run {
  constructor(about = {}) {
    this.name = about.name || '';
    this.meta = about.meta || {};
    this.seed = about.seed || 0;
    this.answer = about.answer ?? null;
    this.right = about.right ?? null;
    this.stop = about.stop || null;
    this.note = about.note || '';
    this.cut = about.cut || '';
    this.wall = about.wall_s || 0;
    this.usage = about.usage || null;
    this.known = Boolean(about.segments);
    this.segments = new Map();
    this.threads = new Map();
    this.labels = new Map();
    // Of a live run whose events say texts: control tokens, and numbers for pairs of id and text.
    this._named = {};
    this._others = new Map();
    this.setPieces(about.pieces || null);
    const infos = new Map((about.threads || []).map((info) => [info.name, info]));
    for (const info of infos.values()) this.labels.set(info.name, info.label);
    for (const segment of about.segments || []) this._add(new Segment(segment));
    for (const [name, info] of infos) if (this.threads.has(name)) this.threads.get(name).info = info;
  }

  get question() { return String(this.meta.question || this.meta.prompt || this.name || 'A run'); }

  get model() { return String(this.meta.model || '').split('@')[0]; }

  // Whether its tree was read: then there are steps, positions and a critical path.
  get derived() { return this.known; }

  get finished() { return this.stop !== null || this.cut !== ''; }

  setPieces(pieces) {
    this._texts = pieces ? pieces.texts : null;
    this._control = new Set(pieces ? pieces.control : []);
    this._ids = pieces && pieces.ids ? pieces.ids : {};
  }

  // Whether ids have texts; else they are shown as they are.
  get spelled() { return this._texts !== null; }

  text(id) {
    if (!this._texts) return `${id} `;
    return this._texts[id] ?? `<${id}?>`;
  }

  control(id) { return this._control.has(id); }

  // The id that the model knows a token by: see `_numbered`.
  idOf(number) { return this._ids[number] ?? number; }

  // Ids of an event that says their texts, as `readable` in plait.spelling numbers them: an id whose text depends on
  // where it stands has a further number, below zero, for each other text.
  _numbered(ids, texts) {
    if (!texts) return ids;
    if (!this._texts) this.setPieces({ texts: { ...this._named }, control: Object.keys(this._named).map(Number) });
    return ids.map((id, i) => {
      const text = texts[i] ?? '', key = `${id} ${text}`;
      if (this._control.has(id) || (this._texts[id] ??= text) === text) return id;
      if (!this._others.has(key)) this._others.set(key, -2 - this._others.size);
      const number = this._others.get(key);
      this._texts[number] = text;
      this._ids[number] = id;
      return number;
    });
  }

  // Fold one event of a live run.
  apply(event) {
    switch (event.event) {
      case 'RunStarted': {
        this.meta = event.meta || {};
        this.seed = event.seed;
        const about = this.meta.tokenizer;
        if (about && Array.isArray(about.tokens)) {
          const control = new Set(about.control || []);
          const ids = about.tokens.map((text, id) => (control.has(text) ? id : -1)).filter((id) => id >= 0);
          this.setPieces({ texts: about.tokens, control: ids });
        } else if (about && about.control) {
          for (const [text, id] of Object.entries(about.control)) this._named[id] = text;
        }
        break;
      }
      case 'ThreadForked':
        event.threads.forEach((name, i) => this.labels.set(name, event.labels[i] || ''));
        break;
      case 'SegmentStarted':
        this._add(new Segment({
          id: event.id, parent: event.parent, forced: this._numbered(event.forced_ids || [], event.texts), joins: event.joins || [],
          join: event.join, keep: event.keep, t: [event.t, event.t],
        }));
        break;
      case 'TokensSampled': {
        const segment = this.segments.get(event.id);
        for (const id of this._numbered(event.token_ids, event.texts)) segment.sampled.push(id);
        for (const p of event.logprobs) segment.logprobs.push(p);
        segment.chunks.push([event.token_ids.length, event.t]);
        segment.t[1] = event.t;
        break;
      }
      case 'SegmentEnded': {
        const segment = this.segments.get(event.id);
        segment.stop = event.stop;
        segment.note = event.note || '';
        segment.t[1] = event.t;
        break;
      }
      case 'ThreadsCut':
        // Which tokens stay is the tree's to say, at the end of the run.
        for (const segment of this.segments.values()) {
          const cut = event.threads.some((name) => segment.thread === name || segment.thread.startsWith(`${name}/`));
          if (cut && (segment.stop === null || segment.t[1] >= event.t)) {
            segment.stop = 'cancelled';
            segment.note = event.note || '';
          }
        }
        break;
      case 'RunEnded':
        this.stop = event.stop;
        this.note = event.note || '';
        break;
      default:
    }
    if (event.t) this.wall = Math.max(this.wall, event.t);
  }

  _add(segment) {
    this.segments.set(segment.id, segment);
    for (const id of segment.joins) this.segments.get(id).joiners.push(segment);
    const name = segment.thread;
    let thread = this.threads.get(name);
    if (!thread) {
      const cut = name.lastIndexOf('/');
      const up = cut < 0 ? null : this.threads.get(name.slice(0, cut));
      thread = { name, up, depth: up ? up.depth + 1 : 0, segments: [], children: [], info: null };
      this.threads.set(name, thread);
      if (up) {
        up.children.push(thread);
        segment.opens = true;
        if (segment.parent !== null) this.segments.get(segment.parent).forks = true;
      }
    }
    thread.segments.push(segment);
    this._order = this._walk = null;
  }

  label(thread) { return this.labels.get(thread.name) || ''; }

  number(thread) { return thread.up ? Number(thread.name.slice(thread.name.lastIndexOf('.') + 1)) + 1 : 0; }

  title(thread) {
    if (!thread.up) return 'root';
    return `thread ${this.number(thread)}`;
  }

  // Threads in program order, parents before children.
  order() {
    if (this._order) return this._order;
    const out = [];
    const visit = (thread) => {
      out.push(thread);
      thread.children.sort((a, b) => compare(a.name, b.name)).forEach(visit);
    };
    for (const thread of this.threads.values()) if (!thread.up) visit(thread);
    return this._order = out;
  }

  // Segments as they are read: those of a block before the segment that joins them.
  reading() {
    if (this._walk) return this._walk;
    const out = [];
    const visit = (thread) => {
      const blocks = new Map();
      for (const child of thread.children) {
        const at = Number(child.name.slice(thread.name.length + 1).split('.')[0]);
        if (!blocks.has(at)) blocks.set(at, []);
        blocks.get(at).push(child);
      }
      for (const segment of thread.segments) {
        out.push(segment);
        const block = blocks.get(segment.number);
        if (block) block.sort((a, b) => compare(a.name, b.name)).forEach(visit);
      }
    };
    for (const thread of this.threads.values()) if (!thread.up) visit(thread);
    return this._walk = out;
  }

  // The segments that read what a thread wrote: its parent's, and those of threads that need it.
  joiners(thread) { return thread.segments[thread.segments.length - 1].joiners; }

  // When a thread and all that it forked works, and until when its lane is taken: seconds and, where known, steps.
  extent(thread) {
    const own = thread.segments, known = this.derived ? 2 : 1, out = [];
    for (let k = 0; k < known; k++) {
      const at = (s) => (k ? s.steps : s.t);
      let end = Math.max(at(own[own.length - 1])[1], ...this.joiners(thread).map((s) => at(s)[0]));
      for (const child of thread.children) end = Math.max(end, this.extent(child)[k][1]);
      out.push([at(own[0])[0], end]);
    }
    return out;
  }

  // What the token at `i` of a segment attends to: segment -> how many of its tokens. As `Tree.context` says.
  sees(segment, i) {
    const read = (last, stop) => {
      const path = [], parts = [];
      for (let at = last; at && at.id !== stop; at = at.parent === null ? null : this.segments.get(at.parent)) path.push(at);
      for (const s of path.reverse()) {
        if (s.keep !== null) keepFirst(parts, s.keep);
        if (s.join === 'merge') for (const id of s.joins) parts.push(...read(this.segments.get(id), s.parent));
        parts.push([s, s.length]);
      }
      return parts;
    };
    const seen = new Map(read(segment, null));
    seen.set(segment, i + 1);
    return seen;
  }

  // Whether log-probabilities were asked of the engine: where not, all are zero.
  get weighed() {
    if (this._weighed === undefined || !this.finished) {
      this._weighed = [...this.segments.values()].some((s) => s.logprobs.some((p) => p !== 0));
    }
    return this._weighed;
  }

  // Text of a segment without control tokens.
  plain(segment) {
    let out = '';
    for (const id of segment.sampled) if (!this.control(id)) out += this.text(id);
    return out;
  }

  // How many tokens of a segment are there at a time; all of those inserted once it began.
  shown(segment, clock) {
    if (clock === null || clock >= segment.t[1]) return segment.length;
    if (clock < segment.t[0]) return 0;
    return segment.forced.length + upper(segment.times(), clock);
  }

  sampledAt(clock) {
    let total = 0;
    for (const s of this.segments.values()) total += Math.max(0, this.shown(s, clock) - s.forced.length);
    return total;
  }
}

// Leaves the first `keep` tokens of what is in `parts`.
function keepFirst(parts, keep) {
  let left = keep;
  for (const part of parts) {
    part[1] = Math.min(part[1], left);
    left -= part[1];
  }
  while (parts.length && !parts[parts.length - 1][1]) parts.pop();
}

// Order of thread names: numbers as numbers, parents first.
function compare(a, b) {
  const x = a.split(/[/.]/), y = b.split(/[/.]/);
  for (let i = 0; i < Math.min(x.length, y.length); i++) if (x[i] !== y[i]) return Number(x[i]) - Number(y[i]);
  return x.length - y.length;
}

// How many values of a sorted array are at most `value`.
function upper(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1; else high = middle;
  }
  return low;
}

function seconds(t) {
  if (t < 0.0000005) return '0 ms';
  if (t < 0.001) return `${(t * 1e6).toFixed(0)} us`;
  if (t < 0.01) return `${(t * 1e3).toFixed(2)} ms`;
  if (t < 0.1) return `${(t * 1e3).toFixed(1)} ms`;
  if (t < 1) return `${(t * 1e3).toFixed(0)} ms`;
  if (t < 100) return `${t.toFixed(2)} s`;
  return `${t.toFixed(0)} s`;
}

const big = (n) => n.toLocaleString('en');

const count = (n, one, many = `${one}s`) => `${big(n)} ${n === 1 ? one : many}`;
