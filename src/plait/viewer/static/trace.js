// One run: its lanes, its text beside them, and what is known of the token or the thread that was chosen.

const HINTS = {
  Answer: 'What the run answers; a tick where it is known to be right.',
  Time: 'From the start of the run to its last event, on the clock of the machine it ran on.',
  'Critical path': 'The longest chain of tokens that wait for each other, of all that were sampled: the steps of an engine with room for every thread.',
  Threads: 'Parts of the work that were done side by side.',
  'Longest context': 'The most tokens that one thread had before it.',
  'Read again': 'Tokens that were given to a parent once more at joins.',
  Ended: 'Why the run ended.',
  Model: 'The weights that wrote the text.',
  Format: 'How the model says where to fork and what is joined.',
  Engine: 'What computed the tokens.',
};
const ABOUT_TEXT = 'Every token, in the order it is read. Dotted: inserted by the runtime. In frames: tags that fork and join.';

class TraceView {
  // watched: the run was just seen live, so it stays on the axis of time and does not unfold once more
  constructor(run, { others = [], race = null, watched = false } = {}) {
    this.run = run;
    this.hover = el('div', { class: 'tip floating', hidden: true });
    this.stage = el('div', { class: 'stage' });
    const pick = (segment, token) => this.pick(segment, token);
    this.reading = new Reading(run, { pick });
    this.side = el('aside', {});
    const on = { pick, hover: (hit, x, y) => this._tip(hit, x, y) };
    this.lanes = new Lanes(run, on, watched ? { axis: 'time', settled: true } : {});
    this.player = new Player(run.wall || 1e-3, (clock) => this.seek(clock));
    this.axes = el('div', { class: 'segmented', role: 'radiogroup', 'aria-label': 'Axis' },
      Object.entries(AXES).map(([key, axis], i) => el('button', {
        role: 'radio', 'data-axis': key, title: `${axis.about} (${i + 1})`, onclick: () => this.choose(key),
      }, axis.name)));
    this.heat = button('toggle', 'Doubt', 'Shade tokens that the model was unsure of (h)', () => this._heat());
    this.tags = button('link', 'hide tags', 'Leave out tags that fork and join (g)', () => this._plain());
    const pack = button('toggle fit', 'Pack', 'Threads that follow each other share lanes (p)', () => this.lanes.pack(!this.lanes.packed));
    const log = el('a', {
      class: 'toggle', href: `/plait/runs/${run.id}/log`, download: `${run.id}.jsonl`, title: 'The log: plait view reads it',
    }, 'Log');
    const twins = others.slice(0, 2).map((other) => button('toggle', `Race ${other.run.model || other.run.name}`, 'Both on one clock (r)',
      () => race(other.index)));
    this.title = el('h1', {});
    this.sentence = el('p', { class: 'sentence', role: 'status' });
    this.stats = el('dl', { class: 'stats' });
    this.meaning = el('p', { class: 'meaning' });
    this.legend = el('div', { class: 'legend' });
    this.node = el('div', { class: 'trace' },
      this.title, this.sentence, this.stats,
      el('div', { class: 'tools' }, this.axes, this.player.node, el('span', { class: 'gap' }), twins, this.heat,
        run.id && log, run.threads.size > 4 && pack, button('toggle fit', 'Fit', 'Show all of it (0)', () => this.lanes.fit())),
      el('div', { class: 'columns' },
        el('div', { class: 'drawn' }, this.stage, this.meaning, this.legend, this.side),
        el('section', { class: 'textual', 'aria-label': 'Text' },
          el('div', { class: 'bar' }, hinted('h3', 'Text', ABOUT_TEXT), this.tags,
            button('link', 'fold all', 'Only the names of threads', () => this.reading.foldAll(true)),
            button('link', 'unfold', 'All that they wrote', () => this.reading.foldAll(false))),
          this.reading.node)),
      this.hover);
    this.head();
    this.setAxis(this.lanes.axis);
    this.pick(null, null);
    this.lanes.attach(this.stage);
  }

  head() {
    const { run } = this, usage = run.usage, stats = [];
    const stat = (name, value, kind, hint = HINTS[name]) => stats.push(
      el('div', { class: kind }, hinted('dt', name, hint), el('dd', {}, value)));
    this.title.textContent = run.question;
    this.sentence.textContent = sentence(run);
    if (run.answer !== null) {
      const grade = run.right === null ? '' : run.right ? ' \u2713' : ' \u2717';
      stat('Answer', `${run.answer}${grade}`, run.right === false ? 'bad' : 'lead');
    }
    stat('Time', seconds(run.wall));
    if (usage) {
      stat('Critical path', `${big(usage.critical_path_tokens)} of ${big(usage.sampled_tokens)}`);
      stat('Threads', usage.threads ? `${big(usage.threads)} in ${count(usage.forks, 'fork')}` : 'none');
      stat('Longest context', big(usage.longest_context_tokens));
      if (usage.reread_tokens) stat('Read again', big(usage.reread_tokens));
    }
    if (run.stop || run.cut) {
      const ended = run.stop ? STOPS[run.stop] || run.stop : 'cut off';
      stat('Ended', ended, run.finished && run.stop !== 'eos' ? 'bad' : '', run.note || run.cut || HINTS.Ended);
    }
    for (const name of ['Model', 'Format', 'Engine']) {
      const value = String(run.meta[name.toLowerCase()] ?? '').split('@')[0];
      if (value) stat(name, value, 'quiet');
    }
    this.stats.replaceChildren(...stats);
    this.legend.replaceChildren(...legend(run));
  }

  // Only time is replayed: on another axis the whole run is seen.
  choose(axis) {
    if (axis !== 'time' && this.player.clock !== null) this.player.reset();
    this.setAxis(axis);
  }

  setAxis(axis) {
    this.lanes.setAxis(axis);
    this.meaning.textContent = `${AXES[this.lanes.axis].about}.`;
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
    if (this.run.finished) this.lanes.clock = null; else this.lanes.follow();
    this.lanes.draw();
    this.reading.refresh();
    this.player.setEnd(this.run.wall || 1e-3);
    this.player.node.hidden = !this.run.finished;
  }

  _plain() {
    const on = this.reading.node.classList.toggle('plain');
    press(this.tags, on);
    this.tags.textContent = on ? 'show tags' : 'hide tags';
  }

  _heat() {
    const on = this.reading.node.classList.toggle('heat');
    press(this.heat, on);
  }

  _tip(hit, x, y) {
    this.hover.hidden = !hit || !hit.segment;
    if (this.hover.hidden) return;
    const { segment: s, token } = hit, run = this.run, thread = run.threads.get(s.thread);
    const name = thread.up ? `${run.title(thread)}  ${cut(run.label(thread), 80)}` : 'root';
    const lines = [el('b', {}, name, el('small', {}, s.id))];
    lines.push(el('span', {}, `${count(s.sampled.length, 'token')} in ${seconds(s.t[1] - s.t[0])}`));
    if (s.joins.length) lines.push(el('span', {}, `joins ${count(s.joins.length, 'thread')} by ${s.join}`));
    if (s.note || BROKEN.has(s.stop)) lines.push(el('span', { class: BROKEN.has(s.stop) ? 'bad' : 'dim' }, s.note || STOPS[s.stop]));
    if (token !== null && token !== undefined) {
      const who = s.inserted(token) ? 'inserted: ' : 'sampled: ';
      lines.push(el('span', { class: 'dim' }, who, el('code', {}, run.text(s.token(token)))));
    }
    this.hover.replaceChildren(...lines);
    this.hover.style.left = `${Math.min(x + 14, window.innerWidth - 270)}px`;
    this.hover.style.top = `${y + 18 + 110 > window.innerHeight ? y - 110 : y + 18}px`;
  }

  key(e) {
    const at = this.lanes.selected, token = this.lanes.token, run = this.run;
    switch (e.key) {
      case '1': case '2': case '3': this.choose(Object.keys(AXES)[Number(e.key) - 1]); return true;
      case 'x': { const keys = Object.keys(AXES); this.choose(keys[(keys.indexOf(this.lanes.axis) + 1) % 3]); return true; }
      case ' ': this.player.toggle(); return true;
      case 'h': this._heat(); return true;
      case 'g': this._plain(); return true;
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
      default: return laneKey(this.lanes, e);
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
  const did = `${big(usage.sampled_tokens)} tokens in ${big(usage.critical_path_tokens)} steps, ${times.toFixed(2)} at a time`;
  return `It split into ${count(usage.threads, 'thread')} side by side: ${did}.`;
}

// What the marks mean that this run has.
function legend(run) {
  const segments = [...run.segments.values()], some = (test) => segments.some(test);
  const item = (kind, text, there = true) => there && el('span', {}, el('i', { class: kind }), text);
  return [
    item('critical', 'critical path', some((s) => s.critical)),
    item('beside', run.derived ? 'beside it' : 'at work', some((s) => !s.critical)),
    item('given', 'not sampled: inserted, or waiting for the engine'),
    item('wait', 'waits', run.threads.size > 1),
    item('forced', 'closed by the runtime', some((s) => s.stop === 'forced' && !s.sampled.length)),
    item('cancelled', 'cancelled', some((s) => s.stop === 'cancelled')),
    item('limit', 'met a limit, or tags that cannot be read', some((s) => BROKEN.has(s.stop) && s.stop !== 'cancelled')),
  ].filter(Boolean);
}
