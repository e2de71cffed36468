// Numbers, times and elements as text. Text reaches the page through textContent only, so nothing in a run is markup.

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size < 1e15 && size >= 1e3) return Math.round(value).toLocaleString("en-US");
  if (size < 1e3 && size >= 1e-3) return String(Number(value.toPrecision(digits)));
  return value.toExponential(2).replace(/\.?0+e/, "e");
}

// Short enough for an axis: 500K, 1.5M.
export function brief(value) {
  if (Math.abs(value) < 1e4 || Math.abs(value) >= 1e15) return number(value, 6);
  return value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 6 });
}

export function duration(seconds) {
  const whole = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export function clock(unixSeconds) {
  const date = new Date(unixSeconds * 1000);
  const time = date.toTimeString().slice(0, 8);
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function table(columns, rows) {
  const cell = (value) => element("td", typeof value === "number" ? { class: "number" } : {},
    value instanceof Node ? value : number(value));
  return element("table", {},
    element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, column))),
    ...rows.map((row) => element("tr", {}, ...row.map(cell))));
}
