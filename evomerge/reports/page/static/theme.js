// Light or dark, before anything is painted: what the reader chose last, else what the system prefers.
"use strict";
document.documentElement.classList.add("js");
try {
  const chosen = localStorage.getItem("evomerge-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* a page in a frame or a file may have no storage */ }
