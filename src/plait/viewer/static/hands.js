// How lanes are moved: wheel and trackpad, mouse, fingers, keys.

function hands(lanes) {
  const { canvas } = lanes, down = new Map();
  let moved = false, apart = 0;
  const at = (e) => {
    const box = canvas.getBoundingClientRect();
    return [e.clientX - box.left, e.clientY - box.top];
  };

  canvas.addEventListener('wheel', (e) => {
    const [x] = at(e);
    if (e.ctrlKey || e.metaKey || e.altKey) {
      lanes.zoom(Math.exp(clamp(-60, e.deltaY, 60) * 0.01), x);
    } else if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) {
      lanes.pan((e.deltaX || e.deltaY) / lanes.width);
    } else {
      const next = clamp(0, lanes.scroll + e.deltaY, lanes.scrollable());
      if (next === lanes.scroll) return;
      lanes.scroll = next;
      lanes.draw();
    }
    e.preventDefault();
  }, { passive: false });

  canvas.addEventListener('pointerdown', (e) => {
    down.set(e.pointerId, at(e));
    moved = false;
    canvas.setPointerCapture(e.pointerId);
  });

  canvas.addEventListener('pointermove', (e) => {
    const [x, y] = at(e), before = down.get(e.pointerId);
    if (!before) hover(e, x, y);
    else if (down.size === 2) pinch(e, x, y);
    else if (moved || Math.abs(x - before[0]) + Math.abs(y - before[1]) >= 4) {
      moved = true;
      lanes.pan((before[0] - x) / (lanes.width - lanes.gutter));
      lanes.scroll = clamp(0, lanes.scroll + before[1] - y, lanes.scrollable());
      down.set(e.pointerId, [x, y]);
      lanes.draw();
    }
  });

  function hover(e, x, y) {
    const hit = lanes.hit(x, y);
    lanes.cursor = x;
    canvas.style.cursor = hit && (hit.segment || hit.gutter) ? 'pointer' : 'default';
    if (lanes.on.hover) lanes.on.hover(hit, e.clientX, e.clientY);
    lanes.draw();
  }

  function pinch(e, x, y) {
    down.set(e.pointerId, [x, y]);
    const [p, q] = [...down.values()], now = Math.hypot(p[0] - q[0], p[1] - q[1]);
    if (apart) lanes.zoom(apart / Math.max(1, now), (p[0] + q[0]) / 2);
    apart = now;
    moved = true;
  }

  function up(e) {
    const was = down.delete(e.pointerId);
    if (down.size < 2) apart = 0;
    if (!was || moved || e.type !== 'pointerup') return;
    const [x, y] = at(e), hit = lanes.hit(x, y), pick = lanes.on.pick || (() => {});
    if (!hit) pick(null, null);
    else if (hit.gutter && hit.thread.children.length && x < 18 + Math.min(hit.thread.depth, 6) * 10) lanes.fold(hit.thread);
    else pick(hit.segment || hit.thread.segments[0], hit.segment ? hit.token : null);
  }
  canvas.addEventListener('pointerup', up);
  canvas.addEventListener('pointercancel', up);

  canvas.addEventListener('pointerleave', () => {
    lanes.cursor = undefined;
    if (lanes.on.hover) lanes.on.hover(null);
    lanes.draw();
  });

  canvas.addEventListener('dblclick', (e) => {
    const hit = lanes.hit(...at(e));
    if (!hit || !hit.segment) return lanes.fit();
    const a = lanes.from(hit.segment), b = lanes.to(hit.segment);
    lanes.show(a - (b - a) * 0.05, (b - a) * 1.1, true);
  });
}

// Whether the key was for the lanes.
function laneKey(lanes, e) {
  switch (e.key) {
    case 'w': case '=': case '+': lanes.zoom(0.7); return true;
    case 's': case '-': lanes.zoom(1 / 0.7); return true;
    case 'a': lanes.pan(-0.15); return true;
    case 'd': lanes.pan(0.15); return true;
    case '0': lanes.fit(); return true;
    case 'p': lanes.pack(!lanes.packed); return true;
    case 'f': lanes.fold(lanes.selected && lanes.run.threads.get(lanes.selected.thread)); return true;
    default: return false;
  }
}
