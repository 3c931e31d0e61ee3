"use strict";
const lanes = document.querySelector(".lanes");
const marks = [...lanes.querySelectorAll(".mark")];
const details = document.querySelector(".details dl");
const all = document.querySelector("#all");
const arrows = document.querySelector(".arrows");
let chosen = null;

const isShown = (mark) => mark.offsetParent !== null;

// What is known of a mark, in the panel.
function tell(mark) {
  details.replaceChildren();
  const add = (name, value) => {
    if (!value) return;
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.append(value);
    details.append(term, text);
  };
  add("Step", mark.dataset.at);
  add("CPU", mark.dataset.cpu);
  add("What", mark.dataset.long);
  add("Address space", mark.dataset.mm);
  add("During", mark.dataset.call);
  const partner = document.getElementById(mark.dataset.partner || "");
  if (partner) {
    const link = document.createElement("a");
    link.href = "#" + partner.id;
    link.textContent = "step " + partner.querySelector(".mark").dataset.at;
    add(mark.dataset.partnerIs, link);
  }
  for (const line of document.querySelectorAll("pre .now")) line.classList.remove("now");
  const line = document.getElementById("l" + mark.dataset.step);
  if (line) line.classList.add("now");
}

// One mark is in the tab order; arrow keys move among those that are shown.
function choose(mark, focus) {
  if (chosen) {
    chosen.tabIndex = -1;
    chosen.setAttribute("aria-pressed", "false");
  }
  chosen = mark;
  mark.tabIndex = 0;
  mark.setAttribute("aria-pressed", "true");
  if (focus) mark.focus();
  tell(mark);
}

function neighbour(mark, key) {
  const shown = marks.filter(isShown);
  const place = shown.indexOf(mark);
  if (key === "ArrowDown") return shown[place + 1];
  if (key === "ArrowUp") return shown[place - 1];
  if (key === "Home") return shown[0];
  if (key === "End") return shown[shown.length - 1];
  const wanted = (other) =>
    key === "ArrowRight" ? +other.dataset.lane > +mark.dataset.lane : +other.dataset.lane < +mark.dataset.lane;
  const distance = (other) =>
    1000 * Math.abs(other.dataset.lane - mark.dataset.lane) + Math.abs(shown.indexOf(other) - place);
  return shown.filter(wanted).sort((one, two) => distance(one) - distance(two))[0];
}

// A line from each request to its answer.
function draw() {
  const box = lanes.getBoundingClientRect();
  let lines = "";
  for (const mark of marks) {
    const partner = document.getElementById(mark.dataset.partner || "")?.querySelector(".mark");
    if (!partner || mark.dataset.partnerIs !== "Answered at" || !isShown(mark) || !isShown(partner)) continue;
    const from = mark.getBoundingClientRect();
    const to = partner.getBoundingClientRect();
    const right = to.left > from.left;
    const x1 = (right ? from.right : from.left) - box.left;
    const x2 = (right ? to.left : to.right) - box.left;
    const y1 = from.top + from.height / 2 - box.top;
    const y2 = to.top + to.height / 2 - box.top;
    const middle = (x1 + x2) / 2;
    const tip = right ? -7 : 7;
    lines += `<path d="M${x1} ${y1} C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}"/>`;
    lines += `<path class="tip" d="M${x2} ${y2} l${tip} -4 v8 z"/>`;
  }
  arrows.innerHTML = lines;
}

for (const mark of marks) {
  mark.tabIndex = -1;
  mark.addEventListener("click", () => choose(mark, true));
  mark.addEventListener("pointerenter", () => tell(mark));
  mark.addEventListener("keydown", (event) => {
    if (!/^(Arrow(Up|Down|Left|Right)|Home|End)$/.test(event.key)) return;
    event.preventDefault();
    const next = neighbour(mark, event.key);
    if (next) choose(next, true);
  });
}
lanes.addEventListener("pointerleave", () => chosen && tell(chosen));
// Links to a step choose its mark.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#e']");
  const row = link && document.getElementById(link.getAttribute("href").slice(1));
  if (!row) return;
  event.preventDefault();
  if (row.classList.contains("minor") && !all.checked) {
    all.checked = true;
    lanes.classList.add("all");
    draw();
  }
  choose(row.querySelector(".mark"), true);
});
all.addEventListener("change", () => {
  lanes.classList.toggle("all", all.checked);
  draw();
});
addEventListener("resize", draw);
// The page is about the last violation; earlier ones may be among the events not shown.
const shown = marks.filter(isShown);
const first = shown.findLast((mark) => mark.classList.contains("violation")) || shown[0];
if (first) choose(first, false);
draw();
