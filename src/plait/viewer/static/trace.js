// One run: its lanes, its text beside them, and what is known of the token or the thread that was chosen.

class TraceView {
  // watched: the run was just seen live, so it stays on the axis of time and does not unfold once more
  constructor(run, { others = [], race = null, watched = false } = {}) {
    this.run = run;
    this.hover = el('div', { class: 'tip floating', hidden: true });
    this.stage = el('div', { class: 'stage' });
    const pick = (segment, token) => this.pick(segment, token);
    this.reading = new Reading(run, { pick });
    this.side = el('aside', {});
    this.lanes = new Lanes(run, { pick, hover: (hit, x, y) => this._tip(hit, x, y) }, watched ? { axis: 'time', settled: true } : {});
    this.player = new Player(run.wall || 1e-3, (clock) => this.seek(clock));
    this.axes = el('div', { class: 'segmented', role: 'radiogroup', 'aria-label': 'Axis' },
      Object.entries(AXES).map(([key, axis], i) => el('button', {
        role: 'radio', 'data-axis': key, title: `${axis.about} (${i + 1})`, onclick: () => this.setAxis(key),
      }, axis.name)));
    this.heat = el('button', { class: 'toggle', 'aria-pressed': 'false', title: 'Shade tokens that the model was unsure of (h)', onclick: () => this._heat() }, 'Doubt');
    this.tags = el('button', { class: 'link', 'aria-pressed': 'false', title: 'Leave out tags that fork and join (g)', onclick: () => this._plain() }, 'hide tags');
    this.pack = run.threads.size > 4 ? el('button', { class: 'toggle fit', title: 'Threads that follow each other share lanes (p)', onclick: () => this.lanes.pack(!this.lanes.packed) }, 'Pack') : null;
    const twins = others.map((other) => el('button', { class: 'toggle', onclick: () => race(other.index) }, `Race ${other.run.model || other.run.name}`));
    this.title = el('h1', {});
    this.sentence = el('p', { class: 'sentence', role: 'status' });
    this.stats = el('dl', { class: 'stats' });
    this.meaning = el('p', { class: 'meaning' });
    this.legend = el('div', { class: 'legend' });
    this.node = el('div', { class: 'trace' },
      this.title, this.sentence, this.stats,
      el('div', { class: 'tools' }, this.axes, this.player.node, el('span', { class: 'gap' }), twins.slice(0, 2), this.heat,
        run.id ? el('a', { class: 'toggle', href: `/plait/runs/${run.id}/log`, download: `${run.id}.jsonl`, title: 'The log: plait view reads it' }, 'Log') : null,
        this.pack, el('button', { class: 'toggle fit', title: 'Show all of it (0)', onclick: () => this.lanes.fit() }, 'Fit')),
      el('div', { class: 'columns' },
        el('div', { class: 'drawn' }, this.stage, this.meaning, this.legend, this.side),
        el('section', { class: 'textual', 'aria-label': 'Text' },
          el('div', { class: 'bar' }, hinted('h3', 'Text', 'Every token, in the order it is read. Dotted: inserted by the runtime. In frames: tags that fork and join.'),
            this.tags,
            el('button', { class: 'link', onclick: () => this.reading.foldAll(true) }, 'fold all'),
            el('button', { class: 'link', onclick: () => this.reading.foldAll(false) }, 'unfold')),
          this.reading.node)),
      this.hover);
    this.head();
    this.setAxis(this.lanes.axis);
    this.pick(null, null);
    this.lanes.attach(this.stage);
  }

  head() {
    const { run } = this, usage = run.usage, stats = [];
    const stat = (name, value, hint, kind) => stats.push(el('div', { class: kind }, hinted('dt', name, hint), el('dd', {}, value)));
    this.title.textContent = run.question;
    this.sentence.textContent = sentence(run);
    if (run.answer !== null) {
      stat('Answer', run.right === null ? run.answer : `${run.answer} ${run.right ? '\u2713' : '\u2717'}`, 'What the run answers; a tick where it is known to be right.', run.right === false ? 'bad' : 'lead');
    }
    stat('Time', seconds(run.wall), 'From the start of the run to its last event, on the clock of the machine it ran on.');
    if (usage) {
      stat('Critical path', `${big(usage.critical_path_tokens)} of ${big(usage.sampled_tokens)}`, 'The longest chain of tokens that wait for each other, of all that were sampled. No engine can be done in fewer steps.');
      stat('Threads', usage.threads ? `${usage.threads} in ${count(usage.forks, 'fork')}` : 'none', 'Parts of the work that were done side by side.');
      stat('Longest context', big(usage.longest_context_tokens), 'The most tokens that one thread had before it.');
      if (usage.reread_tokens) stat('Read again', big(usage.reread_tokens), 'Tokens that were given to a parent once more at joins.');
    }
    stat('Ended', run.stop ? STOPS[run.stop] || run.stop : run.cut ? 'cut off' : 'at work', run.note || run.cut || 'Why the run ended.', (run.stop && run.stop !== 'eos') || run.cut ? 'bad' : '');
    const hints = { model: 'The weights that wrote the text.', format: 'How the model says where to fork and what is joined.', engine: 'What computed the tokens.' };
    for (const [key, hint] of Object.entries(hints)) {
      const value = String(run.meta[key] ?? '').split('@')[0];
      if (value) stat(key[0].toUpperCase() + key.slice(1), value, hint, 'quiet');
    }
    this.stats.replaceChildren(...stats);
    this.legend.replaceChildren(...legend(run));
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
    this.tags.setAttribute('aria-pressed', String(on));
    this.tags.textContent = on ? 'show tags' : 'hide tags';
  }

  _heat() {
    const on = this.reading.node.classList.toggle('heat');
    this.heat.setAttribute('aria-pressed', String(on));
  }

  _tip(hit, x, y) {
    this.hover.hidden = !hit || !hit.segment;
    if (this.hover.hidden) return;
    const { segment: s, token } = hit, run = this.run, thread = run.threads.get(s.thread);
    const lines = [el('b', {}, thread.up ? `${run.title(thread)}  ${cut(run.label(thread), 80)}` : 'root', el('small', {}, s.id))];
    lines.push(el('span', {}, `${count(s.sampled.length, 'token')} in ${seconds(s.t[1] - s.t[0])}`));
    if (s.joins.length) lines.push(el('span', {}, `joins ${count(s.joins.length, 'thread')} by ${s.join}`));
    if (s.note || BROKEN.has(s.stop)) lines.push(el('span', { class: BROKEN.has(s.stop) ? 'bad' : 'dim' }, s.note || STOPS[s.stop]));
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
  return `It split into ${count(usage.threads, 'thread')} side by side: ${big(usage.sampled_tokens)} tokens in ${big(usage.critical_path_tokens)} steps, ${times.toFixed(2)} at a time.`;
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
