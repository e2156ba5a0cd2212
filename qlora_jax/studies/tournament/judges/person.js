
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slot = "arena-" + data.page;
  const byId = id => document.getElementById(id);
  let state = { verdicts: {}, at: 0 };

  function read() {
    try {
      const found = JSON.parse(localStorage.getItem(slot));
      if (!found) return;
      const known = new Set(data.items.map(item => item.id));
      for (const [id, verdict] of Object.entries(found.verdicts))
        if (known.has(id) && [1, 2, 3].includes(verdict)) state.verdicts[id] = verdict;
      if (Number.isInteger(found.at)) state.at = Math.min(Math.max(found.at, 0), data.items.length);
    } catch (error) {
      warn();
    }
  }

  function write() {
    try {
      localStorage.setItem(slot, JSON.stringify(state));
    } catch (error) {
      warn();
    }
  }

  function warn() {
    byId("storage").textContent = "This browser keeps no progress. Save the verdicts to a file before you close the page.";
  }

  function show() {
    const item = data.items[state.at], done = Object.keys(state.verdicts).length;
    byId("count").textContent = done + " of " + data.items.length + " judged";
    byId("bar").firstElementChild.style.width = (100 * done / data.items.length) + "%";
    byId("match").hidden = !item;
    byId("end").hidden = !!item;
    byId("back").disabled = state.at === 0;
    for (const verdict of [1, 2, 3]) {
      const button = byId("choose-" + verdict);
      button.disabled = !item;
      button.setAttribute("aria-pressed", String(!!item && state.verdicts[item.id] === verdict));
    }
    if (!item) return;
    for (const part of ["question", "left", "right"]) byId(part).textContent = item[part];
    byId("question").scrollTop = 0;
    window.scrollTo(0, 0);
  }

  function choose(verdict) {
    const item = data.items[state.at];
    if (!item) return;
    state.verdicts[item.id] = verdict;
    state.at += 1;
    write();
    show();
  }

  function back() {
    if (state.at === 0) return;
    state.at -= 1;
    write();
    show();
  }

  function save() {
    const content = JSON.stringify({ page: data.page, verdicts: state.verdicts }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
    link.download = "verdicts-" + data.page + ".json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  const keys = {
    "1": () => choose(1), ArrowLeft: () => choose(1),
    "2": () => choose(2), ArrowRight: () => choose(2),
    "3": () => choose(3), t: () => choose(3),
    Backspace: back, s: save,
  };
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  for (const verdict of [1, 2, 3]) byId("choose-" + verdict).addEventListener("click", () => choose(verdict));
  byId("back").addEventListener("click", back);
  byId("save").addEventListener("click", save);
  read();
  show();
})();
