// Elements, and what they hold as text: the only way from data to the page.

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === 'class') node.className = value;
    else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? '' : String(value));
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

// A button; one that stays pressed says so.
const button = (kind, name, title, onclick) => el('button', { class: kind, title, onclick }, name);

const press = (node, on) => node.setAttribute('aria-pressed', String(on));

// A name whose meaning is shown to whoever points at it, or moves to it by keys.
const hinted = (tag, name, hint) => el(tag, {}, el('span', { class: 'hint', tabindex: 0, 'data-hint': hint }, name));

// Shows the meaning of names, for as long as they are pointed at or in focus.
function showHints(tip) {
  const show = (e) => {
    const name = e.target.closest && e.target.closest('[data-hint]');
    tip.hidden = !name;
    if (!name) return;
    const box = name.getBoundingClientRect();
    tip.textContent = name.dataset.hint;
    tip.style.left = `${clamp(8, box.left, Math.max(8, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.bottom + 6}px`;
  };
  for (const name of ['pointerover', 'focusin']) document.addEventListener(name, show);
  document.addEventListener('focusout', () => { tip.hidden = true; });
  document.addEventListener('scroll', () => { tip.hidden = true; }, { capture: true, passive: true });
}

const svg = (tag, props = {}, ...children) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, String(value));
  }
  node.append(...children);
  return node;
};

// Colours of the present theme, for canvases.
const palette = {
  read() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ['bg', 'panel', 'line', 'text', 'dim', 'faint', 'accent', 'accent-soft', 'on-accent', 'thread',
      'thread-soft', 'on-thread', 'bad', 'select', 'good', 'hatch']) {
      this[name] = style.getPropertyValue(`--${name}`).trim();
    }
    this.mono = style.getPropertyValue('--mono').trim();
    this.sans = style.getPropertyValue('--sans').trim();
  },
};

// Ticks of an axis: round numbers, about `wanted` of them.
function ticks(from, to, wanted, whole) {
  const raw = (to - from) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(Math.max(raw, 1e-9)));
  let step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw) || raw;
  if (whole) step = Math.max(1, Math.round(step));
  const out = [];
  for (let i = Math.ceil(from / step); i * step <= to + step * 1e-9; i++) out.push(i * step);
  return out;
}

const clamp = (low, value, high) => Math.max(low, Math.min(high, value));
