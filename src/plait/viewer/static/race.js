// A clock that replays, and two runs beside each other on it, as fast as each of them was.

// Replays `end` seconds; tells `on(clock)`; null where nothing is replayed and all is shown.
class Player {
  constructor(end, on) {
    this.end = end;
    this.on = on;
    this.clock = null;
    this.playing = false;
    this.rate = this.calm();
    this.button = el('button', { class: 'play', title: 'At the recorded times (space)', onclick: () => this.toggle() });
    this.slide = el('input', { type: 'range', min: 0, max: 1000, value: 1000, 'aria-label': 'Time' });
    this.slide.addEventListener('input', () => { this.pause(); this.seek(this.slide.value / 1000 * this.end); });
    this.pace = el('select', { 'aria-label': 'Pace', onchange: () => { this.rate = Number(this.pace.value) || this.calm(); } });
    this.node = el('div', { class: 'player' }, this.button, this.slide, this.pace);
    this._paces();
    this._name();
  }

  _name() { this.button.replaceChildren(el('i', { class: this.playing ? 'bars' : 'arrow' }), this.playing ? 'Pause' : 'Replay'); }

  // So slow that a short run can be watched; never faster than it was, unless it was very long.
  calm() {
    if (this.end > 30) return this.end / 20;
    return Math.min(1, Math.max(this.end, 1e-4) / 6);
  }

  _paces() {
    const name = (rate) => (rate < 0.99 ? `${fold(1 / rate)}x slower` : rate > 1.01 ? `${fold(rate)}x faster` : 'as it was');
    const rates = new Set([this.calm(), 1, this.calm() / 4]);
    this.pace.replaceChildren(...[...rates].map((rate) => el('option', { value: rate }, name(rate))));
  }

  setEnd(end) {
    if (end === this.end) return;
    this.end = end;
    this.rate = this.calm();
    this._paces();
  }

  toggle() { if (this.playing) this.pause(); else this.play(); }

  play() {
    if (this.clock === null || this.clock >= this.end) this.clock = 0;
    this.playing = true;
    this._name();
    let before = performance.now();
    const step = (now) => {
      if (!this.playing) return;
      this.seek(this.clock + (now - before) / 1000 * this.rate);
      before = now;
      if (this.clock < this.end) this._frame = requestAnimationFrame(step);
      else this.pause();
    };
    this._frame = requestAnimationFrame(step);
  }

  pause() {
    this.playing = false;
    this._name();
    cancelAnimationFrame(this._frame);
  }

  seek(clock) {
    this.clock = clamp(0, clock, this.end);
    this._slid(this.clock / this.end);
    this.on(this.clock);
  }

  // All of it again.
  reset() {
    this.pause();
    this.clock = null;
    this._slid(1);
    this.on(null);
  }

  _slid(share) {
    this.slide.value = share * 1000;
    this.slide.style.setProperty('--at', `${share * 100}%`);
  }

  close() { this.pause(); }
}

// How much faster what takes `y` is than what takes `x`.
const ratio = (x, y) => (x >= y ? `${(x / Math.max(y, 1e-9)).toFixed(2)}x faster` : `${(y / Math.max(x, 1e-9)).toFixed(2)}x slower`);

const fold = (x) => (x >= 10 ? x.toFixed(0) : x.toFixed(1));

// One of the two: its lane on the common clock, and its text.
class Runner {
  constructor(run, horizon) {
    this.run = run;
    this.time = el('output', { class: 'clock' });
    this.much = el('span', { class: 'dim' });
    this.answer = el('span', { class: 'answer' });
    this.stage = el('div', { class: 'stage' });
    this.reading = new Reading(run);
    const name = run.model || run.name || 'run';
    this.lane = el('section', { class: 'runner' },
      el('header', {}, el('h2', {}, name), this.much, this.answer, this.time), this.stage);
    this.text = el('section', { class: 'said-by' }, el('h3', {}, name), this.reading.node);
    this.lanes = new Lanes(run, { tick: (clock) => this._tell(clock) }, { axis: 'time', horizon, most: 0.24 });
    this.lanes.attach(this.stage);
  }

  over(clock) { return this.run.finished && (clock === null || clock >= this.run.wall); }

  show(clock) {
    const { run } = this, over = this.over(clock), t = over || clock === null ? run.wall : clock;
    this.lanes.clock = over ? null : clock;
    this.lanes.draw();
    this.reading.setClock(over ? null : clock);
    if (clock !== null && !over) this.reading.node.scrollTop = this.reading.node.scrollHeight;
    this._tell(t);
    this.much.textContent = count(run.sampledAt(over ? null : clock), 'token');
    this.answer.textContent = over && run.answer !== null ? run.answer : '';
    this.lane.classList.toggle('over', over);
  }

  _tell(t) { this.time.textContent = t < 1 ? `${(t * 1e3).toFixed(t < 0.1 ? 1 : 0)} ms` : `${t.toFixed(2)} s`; }

  // New events of a run that goes on.
  refresh(horizon) {
    this.lanes.horizon = horizon;
    this.reading.refresh();
    this.show(this.run.finished ? null : Math.max(this.run.wall, this.lanes.clock || 0));
    if (!this.run.finished) this.lanes.follow();
  }

  close() { this.lanes.close(); }
}

class RaceView {
  // together: both ran at the same time on one machine; choose: what other runs are picked with
  constructor(first, second, { choose, together = false } = {}) {
    this.together = together;
    this.runs = [first, second];
    this.horizon = this._horizon();
    this.runners = this.runs.map((run) => new Runner(run, this.horizon));
    this.player = new Player(this.horizon, (clock) => this.show(clock));
    this.verdict = el('p', { class: 'sentence', role: 'status' });
    this.node = el('div', { class: 'race' },
      el('h1', {}, first.question), this.verdict,
      el('div', { class: 'tools' }, this.player.node, choose || null),
      this.runners.map((runner) => runner.lane),
      el('div', { class: 'texts' }, this.runners.map((runner) => runner.text)));
    this.show(null);
  }

  _horizon() { return Math.max(...this.runs.map((run) => (run.finished ? run.wall : roomy(run.wall))), 1e-3); }

  show(clock) {
    const [a, b] = this.runners, both = this.runs.every((run) => run.finished);
    for (const runner of this.runners) runner.show(clock);
    this.verdict.textContent = this._verdict(clock);
    const winner = a.run.wall <= b.run.wall ? a : b;
    for (const runner of this.runners) runner.lane.classList.toggle('first', both && runner === winner && runner.over(clock));
  }

  _verdict(clock) {
    const [a, b] = this.runs;
    if (a.question !== b.question) return 'Two different questions: the clocks run together, the times do not compare.';
    if (!a.finished || !b.finished) return 'The same question on two models, on one clock.';
    if (clock !== null && clock < this.horizon) return 'The same question on two models, each as fast as it was.';
    const steps = (run) => run.usage && run.usage.critical_path_tokens;
    const said = (run) => `${run.model || run.name} needed ${seconds(run.wall)}${run.usage ? ` and ${count(steps(run), 'step')}` : ''}`;
    const fewer = a.usage && b.usage ? `, ${ratio(steps(b), steps(a))} in steps` : '';
    const how = this.together ? ' Both ran at the same time on one server.' : '';
    return `${said(a)}, ${said(b)}: ${ratio(b.wall, a.wall)} in time${fewer}.${how}`;
  }

  // Runs that go on: new events were folded in.
  refresh() {
    this.horizon = this._horizon();
    for (const runner of this.runners) runner.refresh(this.horizon);
    this.verdict.textContent = this._verdict(null);
    this.player.setEnd(this.horizon);
    this.player.node.hidden = !this.runs.every((run) => run.finished);
  }

  key(e) {
    if (e.key === ' ') this.player.toggle();
    else if (e.key === 'Escape') this.player.reset();
    else if (e.key === 'ArrowRight' || e.key === 'ArrowLeft') {
      const right = e.key === 'ArrowRight';
      this.player.pause();
      this.player.seek((this.player.clock ?? (right ? 0 : this.horizon)) + (right ? 1 : -1) * this.horizon / 100);
    } else return false;
    return true;
  }

  restyle() { this.runners.forEach((runner) => runner.lanes.draw()); }

  close() { this.player.close(); this.runners.forEach((runner) => runner.close()); }
}
