"use strict";
// The browser of examples. Texts of models and users reach the page through textContent only.
(async () => {
  const byId = (name) => document.getElementById(name);
  const about = JSON.parse(byId("about").textContent);
  const parts = [...document.querySelectorAll("script.chunk")];
  const ROWS = 40;

  const unpack = async (element) => {
    const coded = atob(element.textContent.trim());
    const bytes = new Uint8Array(coded.length);
    for (let i = 0; i < coded.length; i += 1) bytes[i] = coded.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const index = await unpack(byId("index"));
  const unpacked = new Map();
  const chunk = (place) => {
    if (!unpacked.has(place)) unpacked.set(place, unpack(parts[place]));
    return unpacked.get(place);
  };
  const textsOf = async (row) => {
    const found = await chunk(Math.floor(row / about.chunk_rows));
    const [prompt, answer, why, reason, status, flawed, verdicts, raw, packed] = found.r[row % about.chunk_rows];
    const text = (place) => (place === -1 ? found.p[prompt] : place === -2 ? answer : found.t[place]);
    const calls = packed.map(([role, messages, replies]) => ({
      role,
      messages: messages.map(([of, places]) => ({ role: of, content: places.map(text).join("") })),
      replies: replies.map(([reply, finish_reason, reasoning]) => ({ reply, finish_reason, reasoning })),
    }));
    return { prompt: found.p[prompt], answer, why, reason, status, flawed, verdicts, raw, calls };
  };

  const make = (tag, text, kind) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  const shown = (number, digits = 2) => (number === null ? "–" : String(Number(number.toFixed(digits))));
  const scoresOf = (row) => index.scores.map((column) => column[row]);
  const apart = (row) => {
    const read = scoresOf(row).filter((score) => score !== null);
    return read.length < 2 ? null : Math.max(...read) - Math.min(...read);
  };
  const siblings = new Map();
  index.prompt.forEach((prompt, row) => {
    if (!siblings.has(prompt)) siblings.set(prompt, []);
    siblings.get(prompt).push(row);
  });

  // --- filters and order
  const choices = (select, names) => names.forEach((name, i) => {
    const option = make("option", name);
    option.value = String(i);
    select.append(option);
  });
  choices(byId("label"), about.labels);
  choices(byId("failure"), about.failures);

  const passes = (row, label, disagreement, failure) => {
    if (label !== "" && index.label[row] !== Number(label)) return false;
    if (failure !== "" && index.failure[row] !== Number(failure)) return false;
    if (disagreement === "") return true;
    if (disagreement === "unread") return scoresOf(row).includes(null);
    const found = apart(row);
    return found !== null && (disagreement === "0" ? found === 0 : found >= Number(disagreement));
  };
  const orders = {
    prompt: null,
    high: (row) => index.final[row] === null ? Infinity : -index.final[row],
    low: (row) => index.final[row] === null ? Infinity : index.final[row],
    apart: (row) => -(apart(row) ?? -1),
    long: (row) => -index.chars[row],
    short: (row) => index.chars[row],
  };
  const holds = async (row, words) => {
    const texts = await textsOf(row);
    const all = [texts.prompt, texts.answer, texts.why, texts.reason, index.id[row], ...texts.verdicts.map((v) => v[2])];
    const text = all.filter((part) => part !== null).join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  };

  let found = [];
  let first = 0;
  let round = 0;
  const select = async () => {
    round += 1;
    const mine = round;
    const [label, disagreement, failure, sort] = ["label", "disagreement", "failure", "sort"].map((n) => byId(n).value);
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let rows = [];
    for (let row = 0; row < about.rows; row += 1) if (passes(row, label, disagreement, failure)) rows.push(row);
    if (words.length) {
      byId("count").textContent = "Searching …";
      const matching = [];
      for (const row of rows) {
        if (await holds(row, words)) matching.push(row);
        if (mine !== round) return;
      }
      rows = matching;
    }
    const key = orders[sort];
    if (key) rows.sort((a, b) => { const [x, y] = [key(a), key(b)]; return x === y ? a - b : x - y; });
    found = rows;
    first = 0;
    list();
    document.documentElement.dataset.selected = String(mine);
  };

  // --- the list
  const list = () => {
    byId("count").textContent = `${found.length.toLocaleString("en")} of ${about.rows.toLocaleString("en")} candidates`;
    byId("rows").replaceChildren(...found.slice(first, first + ROWS).map(item));
    byId("where").textContent = found.length
      ? `${first + 1} to ${Math.min(first + ROWS, found.length)} of ${found.length.toLocaleString("en")}`
      : "nothing to show";
    byId("back").disabled = first === 0;
    byId("next").disabled = first + ROWS >= found.length;
    byId("pager").hidden = found.length <= ROWS;
  };
  const label = (row) => about.labels[index.label[row]];
  const item = (row) => {
    const line = make("li");
    const button = make("button", undefined, "row");
    button.type = "button";
    button.dataset.row = String(row);
    button.setAttribute("aria-expanded", "false");
    const failure = about.failures[index.failure[row]];
    const marks = scoresOf(row).map((score) => shown(score, 1)).join(" · ")
      + (failure && failure !== "none" ? ` · ${failure}` : "");
    button.append(
      make("span", label(row), `chip ${label(row)}`),
      make("span", shown(index.final[row]), "final"),
      make("span", index.snippets[index.prompt[row]] || "(no prompt)", "said"),
      make("span", marks, "marks"),
    );
    button.addEventListener("click", () => toggle(line, button, row));
    line.append(button);
    return line;
  };
  const toggle = async (line, button, row) => {
    const old = line.querySelector(".open");
    button.setAttribute("aria-expanded", String(!old));
    if (old) { old.remove(); return; }
    const holder = make("div", undefined, "open");
    line.append(holder);
    holder.append(...detail(row, await textsOf(row)));
  };

  // --- one candidate
  const block = (text) => {
    const element = make("pre", text);
    element.dir = "auto";
    element.tabIndex = 0;
    return element;
  };
  const table = (head, rows) => {
    const holder = make("div", undefined, "wide");
    const made = make("table");
    const top = made.createTHead().insertRow();
    head.forEach((name) => { const cell = make("th", name); cell.scope = "col"; top.append(cell); });
    const body = made.createTBody();
    rows.forEach((row) => {
      const line = body.insertRow();
      row.forEach((text) => { const cell = line.insertCell(); cell.textContent = text; cell.dir = "auto"; });
    });
    holder.append(made);
    holder.tabIndex = 0;
    return holder;
  };
  const folded = (summary, content) => {
    const holder = make("details");
    holder.append(make("summary", summary));
    holder.addEventListener("toggle", () => holder.append(...content()), { once: true });
    return holder;
  };
  const callee = (role) => (role === "candidate" || role.startsWith("generate") ? "the generator" : role.replace("/", " "));
  const critic = (row, texts) => {
    if (texts.status === null && texts.flawed === null) return "No critique.";
    const verdict = texts.flawed === null ? `not read (${texts.status})` : texts.flawed ? "flawed" : "sound";
    const failure = about.failures[index.failure[row]];
    const kind = failure === "none" ? "" : failure;
    return [verdict, kind, texts.reason].filter(Boolean).join(": ");
  };
  const detail = (row, texts) => {
    const made = [make("h3", "Prompt"), block(texts.prompt), make("h3", "Answer"), block(texts.answer ?? "(no answer)")];
    made.push(make("h3", "Judges"));
    made.push(table(["judge", "score", "reason", "reply"], texts.verdicts.map(([judge, score, reason, status]) =>
      [judge, score === null ? "–" : shown(score), reason ?? "", status ?? ""])));
    const replies = [...texts.verdicts.map(([judge, , , , raw]) => [`judge/${judge}`, raw]), ["critic", texts.raw]];
    made.push(make("h3", "Critic"), make("p", critic(row, texts)));
    const logged = new Set(texts.calls.map((call) => call.role));
    made.push(...replies.filter(([role, raw]) => raw !== null && raw !== undefined && !logged.has(role))
      .map(([role, raw]) => {
        const holder = make("details");
        holder.append(make("summary", `Raw reply of ${role.replace("/", " ")}`), block(raw));
        return holder;
      }));
    made.push(...texts.calls.map((call) => folded(`Call to ${callee(call.role)}: messages and reply`, () => [
      ...call.messages.flatMap(({ role, content }) => [make("h4", `Sent as ${role}`), block(content)]),
      ...call.replies.flatMap(({ reply, finish_reason, reasoning }) => [
        make("h4", `Reply (${finish_reason})`), block(reply), ...(reasoning ? [make("h4", "Reasoning"), block(reasoning)] : []),
      ]),
    ])));
    made.push(make("h3", "Decision"));
    const decision = make("p");
    decision.append(make("strong", label(row), label(row)));
    decision.append(`: mean ${shown(index.mean[row])}, variance ${shown(index.variance[row])}, final score `
      + `${shown(index.final[row])}. ${texts.why ?? ""}`);
    made.push(decision);
    const others = siblings.get(index.prompt[row]).filter((other) => other !== row);
    if (others.length) {
      const holder = make("div", undefined, "others");
      others.forEach((other) => {
        const button = make("button", `${label(other)}, ${shown(index.final[other])}`);
        button.type = "button";
        const place = make("div");
        button.setAttribute("aria-expanded", "false");
        button.addEventListener("click", async () => {
          const open = place.childElementCount > 0;
          button.setAttribute("aria-expanded", String(!open));
          if (open) { place.replaceChildren(); return; }
          const more = await textsOf(other);
          const said = more.verdicts.map(([judge, score, reason, status]) =>
            [judge, score === null ? "–" : shown(score), reason ?? "", status ?? ""]);
          place.append(block(more.answer ?? "(no answer)"), table(["judge", "score", "reason", "reply"], said),
            make("p", `Critic: ${critic(other, more)}`), make("p", `Decision: ${label(other)}. ${more.why ?? ""}`));
        });
        holder.append(button, place);
      });
      made.push(make("h3", "Other candidates for this prompt"), holder);
    }
    const bar = make("div", undefined, "tools");
    const link = make("a", "Link to this candidate");
    link.href = `#${encodeURIComponent(index.id[row])}`;
    const button = make("button", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      button.textContent = (await copied(asText(row, texts))) ? "Copied" : "Not copied";
    });
    bar.append(button, link);
    made.unshift(bar);
    const prompt = index.prompts[index.prompt[row]];
    made.push(make("p", `candidate ${index.id[row]} of prompt ${prompt}; the call log keeps its calls under the prompt`
      + (texts.calls.length ? "" : " (they are not on this page)"), "id"));
    return made;
  };
  const asText = (row, texts) => JSON.stringify({
    candidate_id: index.id[row],
    prompt_id: index.prompts[index.prompt[row]],
    prompt: texts.prompt,
    response: texts.answer,
    verdicts: texts.verdicts.map(([judge, score, reason, status, raw]) =>
      ({ judge, score, reason, parse_status: status, raw })),
    critique: { flawed: texts.flawed, reason: texts.reason, parse_status: texts.status, raw: texts.raw },
    label: label(row),
    final_score: index.final[row],
    why: texts.why,
    calls: texts.calls,
  }, null, 2);
  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {  // no permission, or a page that is not served securely
      const field = make("textarea", text);
      document.body.append(field);
      field.select();
      const done = document.execCommand("copy");
      field.remove();
      return done;
    }
  };

  // --- addresses: #ID opens a candidate
  const visit = async () => {
    let id = "";
    try { id = decodeURIComponent(location.hash.slice(1)); } catch { return; }
    const row = id ? index.id.indexOf(id) : -1;
    if (row < 0) return;
    if (!found.includes(row)) {
      ["search", "label", "disagreement", "failure"].forEach((name) => { byId(name).value = ""; });
      byId("sort").value = "prompt";
      await select();
    }
    first = Math.floor(found.indexOf(row) / ROWS) * ROWS;
    list();
    const button = document.querySelector(`.row[data-row="${row}"]`);
    await toggle(button.parentElement, button, row);
    button.scrollIntoView();
  };

  // --- start
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(select, 250); });
  ["label", "disagreement", "failure", "sort"].forEach((name) => byId(name).addEventListener("change", select));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  const turn = (by) => { first += by; list(); byId("count").scrollIntoView({ block: "nearest" }); };
  byId("back").addEventListener("click", () => turn(-ROWS));
  byId("next").addEventListener("click", () => turn(ROWS));
  window.addEventListener("hashchange", visit);
  await select();
  byId("browser").hidden = false;
  byId("unpacking").hidden = true;
  await visit();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})().catch((error) => {
  document.getElementById("unpacking").textContent = `The examples could not be unpacked: ${error.message}`;
});
