"use strict";
// Search and keys; without this script the page shows the same samples.
const articles = [...document.querySelectorAll("article")];
const search = document.querySelector("#search");
const count = document.querySelector("#count");
const texts = articles.map((article) => article.textContent.toLowerCase());
let current = -1;

const shown = () => articles.filter((article) => !article.hidden);

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  articles.forEach((article, i) => { article.hidden = !words.every((word) => texts[i].includes(word)); });
  current = -1;
  count.textContent = words.length ? `${shown().length} of ${articles.length}` : `${articles.length} samples`;
}

function go(step) {
  const list = shown();
  if (!list.length) return;
  current = Math.max(0, Math.min(list.length - 1, current + step));
  articles.forEach((article) => article.classList.remove("current"));
  list[current].classList.add("current");
  list[current].scrollIntoView({ block: "start" });
  count.textContent = `${current + 1} of ${list.length}`;
}

function turn() {
  const root = document.documentElement;
  const dark = root.style.colorScheme
    ? root.style.colorScheme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
}

search.addEventListener("input", filter);
document.querySelector("#theme").addEventListener("click", turn);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === search) {
    if (event.key === "Escape" || event.key === "Enter") search.blur();
    return;
  }
  const keys = { j: () => go(1), k: () => go(-1), t: turn, "/": () => { search.focus(); } };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
document.querySelector("#tools").hidden = false;
filter();
