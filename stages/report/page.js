"use strict";
// Two things move on the page: a crosshair with a line of text over each chart, and the replay of recorded games.
(() => {
  const tip = document.getElementById("tip");
  let follow = () => {};

  // ---- charts: data-tips holds one text per x position
  for (const chart of document.querySelectorAll("svg[data-tips]")) {
    const tips = JSON.parse(chart.dataset.tips);
    const left = Number(chart.dataset.left), right = Number(chart.dataset.right);
    const centred = chart.dataset.centred === "1";
    const box = chart.viewBox.baseVal;
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", 6);
    cross.setAttribute("y2", box.height - 24);
    let shown = -1;

    const show = (index) => {
      shown = Math.max(0, Math.min(tips.length - 1, index));
      const inner = box.width - left - right;
      const x = left + inner * (centred ? (shown + 0.5) / tips.length : shown / Math.max(tips.length - 1, 1));
      cross.setAttribute("x1", x);
      cross.setAttribute("x2", x);
      chart.append(cross);
      tip.textContent = tips[shown];
      tip.hidden = false;
      follow = () => {
        const area = chart.getBoundingClientRect();
        const at = area.left + (x / box.width) * area.width;
        tip.style.left = Math.max(8, Math.min(innerWidth - tip.offsetWidth - 8, at - tip.offsetWidth / 2)) + "px";
        tip.style.top = Math.max(8, area.top - tip.offsetHeight - 4) + "px";
      };
      follow();
    };
    const hide = () => { tip.hidden = true; follow = () => {}; cross.remove(); shown = -1; };
    const point = (event) => {
      const area = chart.getBoundingClientRect();
      const share = (((event.clientX - area.left) / area.width) * box.width - left) / (box.width - left - right);
      show(centred ? Math.floor(share * tips.length) : Math.round(share * (tips.length - 1)));
    };
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", point);
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { show(shown + step); event.preventDefault(); }
      if (event.key === "Escape") hide();
    });
  }
  addEventListener("scroll", () => follow(), { passive: true });

  // ---- replay
  const games = JSON.parse(document.getElementById("games").textContent);
  const root = document.getElementById("replay");
  if (!root || !games.length) return;
  const CELLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const WAY = { W: "up", A: "left", S: "down", D: "right" };
  const part = (name) => root.querySelector("#" + name);
  const board = part("board"), cells = part("cells"), pieces = part("pieces"), slider = part("slider");
  const play = part("play"), speed = part("speed"), said = part("said");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let game = null, frames = [], at = 0, timer = 0, settling = 0;

  // Where each tile of `before` goes when the board is pushed; the same rules as the task's, checked by a test.
  function push(before, size, letter) {
    const after = new Array(size * size).fill(0), paths = [], merged = new Set();
    let gained = 0;
    for (let line = 0; line < size; line++) {
      const cell = (i) => letter === "A" ? line * size + i : letter === "D" ? line * size + size - 1 - i
        : letter === "W" ? i * size + line : (size - 1 - i) * size + line;
      let next = 0, open = false;
      for (let i = 0; i < size; i++) {
        const exponent = before[cell(i)];
        if (!exponent) continue;
        if (open && after[cell(next - 1)] === exponent) {
          after[cell(next - 1)] = exponent + 1;
          gained += 2 ** (exponent + 1);
          merged.add(cell(next - 1));
          open = false;
        } else {
          after[cell(next)] = exponent;
          next += 1;
          open = true;
        }
        paths.push([cell(i), cell(next - 1), exponent]);
      }
    }
    return { after, paths, merged, gained };
  }

  function unfold(recorded) {
    const digits = (text) => Array.from(text, (digit) => parseInt(digit, 36));
    const list = [{ cells: digits(recorded.start), score: 0, letter: "", paths: [], merged: new Set(), fresh: -1 }];
    for (let i = 0; i < recorded.moves.length; i += 3) {
      const [letter, where, exponent] = recorded.moves.slice(i, i + 3);
      const last = list[list.length - 1];
      const pushed = push(last.cells, recorded.size, letter);
      const fresh = where === "-" ? -1 : CELLS.indexOf(where);
      if (fresh >= 0) pushed.after[fresh] = parseInt(exponent, 36);
      list.push({ cells: pushed.after, score: last.score + pushed.gained, letter, paths: pushed.paths,
        merged: pushed.merged, fresh });
    }
    return list;
  }

  function place(cell, exponent, kind) {
    const piece = document.createElement("div"), face = document.createElement("i");
    const value = String(2 ** exponent);
    piece.className = `piece e${exponent} d${value.length} ${kind}`;
    piece.style.setProperty("--x", cell % game.size);
    piece.style.setProperty("--y", Math.floor(cell / game.size));
    face.textContent = value;
    piece.append(face);
    pieces.append(piece);
    return piece;
  }

  function draw(moved) {
    clearTimeout(settling);
    const frame = frames[at], last = frames.length - 1;
    const settle = () => {
      pieces.replaceChildren();
      frame.cells.forEach((exponent, cell) => {
        if (exponent) place(cell, exponent, !moved ? "" : cell === frame.fresh ? "new" : frame.merged.has(cell) ? "merged" : "");
      });
    };
    if (moved && !calm && Number(speed.value) <= 10) {
      pieces.replaceChildren();
      const pairs = frame.paths.map(([from, to, exponent]) => [place(from, exponent, "moving"), to]);
      pieces.getBoundingClientRect();
      for (const [piece, to] of pairs) {
        piece.style.setProperty("--x", to % game.size);
        piece.style.setProperty("--y", Math.floor(to / game.size));
      }
      settling = setTimeout(settle, 95);
    } else settle();
    slider.value = at;
    slider.setAttribute("aria-valuetext", `move ${at} of ${last}`);
    part("move").textContent = `${at} / ${last}`;
    part("score").textContent = frame.score;
    part("largest").textContent = 2 ** Math.max(...frame.cells);
    part("letter").textContent = at === last && last ? game.state.replace("_", " ") : WAY[frame.letter] || "start";
    board.setAttribute("aria-label", `Board after move ${at} of ${last}, score ${frame.score}`);
  }

  function stop() {
    clearTimeout(timer);
    timer = 0;
    play.setAttribute("aria-label", "Play");
    root.classList.remove("playing");
  }
  function go(index, moved = false) {
    at = Math.max(0, Math.min(frames.length - 1, index));
    draw(moved);
  }
  function tick() {
    if (at >= frames.length - 1) { stop(); said.textContent = "The game has ended."; return; }
    go(at + 1, true);
    timer = setTimeout(tick, 1000 / Number(speed.value));
  }
  function toggle() {
    if (timer) { stop(); return; }
    if (at >= frames.length - 1) go(0);
    play.setAttribute("aria-label", "Pause");
    root.classList.add("playing");
    timer = setTimeout(tick, 1000 / Number(speed.value));
  }
  function step(by) { stop(); go(at + by, by === 1 && at < frames.length - 1); }

  function choose(index) {
    stop();
    game = games[index];
    frames = unfold(game);
    board.style.setProperty("--size", game.size);
    cells.replaceChildren(...Array.from({ length: game.size ** 2 }, () => document.createElement("i")));
    slider.max = frames.length - 1;
    for (const button of root.querySelectorAll(".choices button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.game) === index));
    }
    for (const code of root.querySelectorAll("[data-program]")) code.hidden = Number(code.dataset.program) !== index;
    go(frames.length - 1);
  }

  for (const button of root.querySelectorAll(".choices button")) {
    button.addEventListener("click", () => choose(Number(button.dataset.game)));
  }
  play.addEventListener("click", toggle);
  part("first").addEventListener("click", () => { stop(); go(0); });
  part("back").addEventListener("click", () => step(-1));
  part("forward").addEventListener("click", () => step(1));
  part("last").addEventListener("click", () => { stop(); go(frames.length - 1); });
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  part("player").addEventListener("keydown", (event) => {
    if (event.target === speed) return;
    const action = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => { stop(); go(0); },
      End: () => { stop(); go(frames.length - 1); } }[event.key];
    if (action) action();
    else if (event.key === " " && event.target.tagName !== "BUTTON") toggle();
    else return;
    event.preventDefault();
  });
  choose(0);
})();
