// The facts of the chosen run: status line, tiles, alarms, events, settings.

import { clock, duration, element, number, table } from "./text.js";

const WORDS = {
  running: () => "running",
  finished: (since) => `finished ${clock(since)}`,
  stalled: (since) => `stalled: nothing written since ${clock(since)}`,
  interrupted: (since) => `interrupted ${clock(since)}; run the same command again to continue`,
  stopped: (since) => `stopped ${clock(since)}`,
  empty: () => "no metrics yet",
};

export function showFacts(facts) {
  const status = document.getElementById("status");
  status.className = facts.status;
  status.textContent = WORDS[facts.status](facts.since);
  document.getElementById("tiles").replaceChildren(...tiles(facts));
  document.getElementById("alarms").replaceChildren(...alarms(facts));
  document.getElementById("events").replaceChildren(events(facts.events));
  document.getElementById("settings").replaceChildren(settings(facts));
  document.getElementById("notice").textContent = notice(facts);
}

function notice(facts) {
  if (facts.behind_bytes > 1e6) return `reading: ${number(Math.round(facts.behind_bytes / 1e6))} MB to go`;
  return facts.bad_lines ? `${facts.bad_lines} damaged lines in the run's logs are left out` : "";
}

function tiles(facts) {
  const shown = [["step", facts.steps ? `${number(facts.step)} of ${number(facts.steps)}` : number(facts.step)]];
  for (const key of ["loss", "val_loss", "reward", "tokens_per_s", "tokens"]) {
    if (key in facts.last) shown.push([key.replaceAll("_", " "), number(facts.last[key])]);
  }
  if (facts.seconds_per_step !== null) shown.push(["a step", duration0(facts.seconds_per_step)]);
  if (facts.seconds_left !== null) shown.push(["left", duration(facts.seconds_left)]);
  const saved = facts.checkpoints;
  shown.push(["checkpoints", saved.length ? saved.slice(-3).map(number).join(" · ") : "none"]);
  return shown.map(([name, value]) => {
    const tile = element("div", {}, element("b", {}, value), name);
    tile.dataset.fact = name;
    return tile;
  });
}

function duration0(seconds) {
  return seconds < 10 ? `${number(Number(seconds.toPrecision(2)))} s` : duration(seconds);
}

function alarms(facts) {
  const counts = Object.entries(facts.alarm_counts);
  if (!counts.length) return [element("p", { class: "good" }, "none")];
  const summary = counts.map(([name, count]) => `${name} ×${count}`).join(", ");
  const rows = facts.alarms.toReversed().map((alarm) => [
    alarm.step, element("span", { class: alarm.action === "warn" ? "" : "bad" }, alarm.alarm), alarm.where || "",
    alarm.value, alarm.limit, alarm.cause, alarm.remedy, alarm.action,
  ]);
  const columns = ["step", "alarm", "where", "value", "limit", "cause", "remedy", "action"];
  return [element("p", { class: "bad" }, summary), element("div", { class: "scroll" }, table(columns, rows))];
}

function events(list) {
  if (!list.length) return element("p", { class: "note" }, "none");
  return table(["time", "event", ""], list.toReversed().map(({ time, kind, ...rest }) => [
    time ? clock(time) : "", kind, Object.entries(rest).map(([key, value]) => `${key} ${plain(value)}`).join(", "),
  ]));
}

function settings(facts) {
  const parts = [["settings", facts.config], ["machine", facts.env], ["result", facts.result]];
  return element("div", {}, ...parts.filter(([, values]) => Object.keys(values).length).map(([title, values]) =>
    element("div", {}, element("h3", {}, title),
      table(["", ""], Object.entries(values).map(([key, value]) => [key, plain(value)])))));
}

function plain(value) {
  return typeof value === "object" && value !== null ? JSON.stringify(value) : number(value);
}
