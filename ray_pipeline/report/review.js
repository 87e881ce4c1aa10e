"use strict";
(() => {
  const find = (name) => document.getElementById(name);
  const { rows, key, file } = JSON.parse(find("data").textContent);
  const buttons = [...document.querySelectorAll("#answers button")];
  let place = 0;
  let given = {};
  try { given = JSON.parse(localStorage.getItem(key)) || {}; } catch { /* kept for this visit only */ }

  const keep = () => { try { localStorage.setItem(key, JSON.stringify(given)); } catch { /* as above */ } };
  const answer = () => given[rows[place].candidate_id] || {};
  const labelled = () => rows.filter((row) => (given[row.candidate_id] || {}).label).length;

  function show() {
    const row = rows[place];
    find("prompt").textContent = row.prompt;
    find("response").textContent = row.response;
    find("judges").textContent = [
      `${row.label}: ${row.why}`,
      ...row.judges.map((one) => `${one.judge}: ${one.score ?? "unread"}${one.reason ? `\n${one.reason}` : ""}`),
      ...(row.critique ? [`critic: ${row.critique}`] : []),
    ].join("\n\n");
    find("note").value = answer().note || "";
    find("said").open = false;
    count();
  }

  function count() {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.label === answer().label));
    find("progress").textContent = `Row ${place + 1} of ${rows.length}, ${labelled()} labelled`;
  }

  function change(values) {
    const name = rows[place].candidate_id;
    given[name] = { ...given[name], ...values };
    keep();
    count();
  }

  function go(to) {
    place = Math.min(rows.length - 1, Math.max(0, to));
    show();
  }

  function label(value) {
    change({ label: value });
    if (place + 1 < rows.length) go(place + 1);
  }

  function goToOpen() {
    const ahead = [...rows.keys()].map((i) => (place + 1 + i) % rows.length);
    const open = ahead.find((i) => !(given[rows[i].candidate_id] || {}).label);
    if (open !== undefined) go(open);
  }

  function save() {
    const lines = rows.filter((row) => (given[row.candidate_id] || {}).label).map((row) => {
      const { label, note } = given[row.candidate_id];
      const { candidate_id, prompt_id, chosen_as, probability } = row;
      return JSON.stringify({ candidate_id, prompt_id, label, note: note || null, chosen_as, probability });
    });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines.map((line) => `${line}\n`), { type: "application/jsonl" }));
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const button of buttons) button.addEventListener("click", () => label(button.dataset.label));
  find("note").addEventListener("input", (event) => change({ note: event.target.value }));
  find("previous").addEventListener("click", () => go(place - 1));
  find("next").addEventListener("click", () => go(place + 1));
  find("open").addEventListener("click", goToOpen);
  find("save").addEventListener("click", save);

  const actions = {
    d: () => label("desirable"),
    u: () => label("undesirable"),
    "?": () => label("unsure"),
    n: () => find("note").focus(),
    s: () => { find("said").open = !find("said").open; },
    o: goToOpen,
    ArrowLeft: () => go(place - 1),
    ArrowRight: () => go(place + 1),
  };
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "s") {
      event.preventDefault();
      save();
      return;
    }
    if (event.target === find("note")) {
      if (event.key === "Enter" || event.key === "Escape") find("note").blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  });
  show();
})();
