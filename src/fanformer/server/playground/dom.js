// What several parts of the page do with its elements.

// Returns a new element of that class with that text.
export function make(tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

// Returns where an arrow key, Home or End goes to from a place among so many, and keeps it from scrolling the page;
// undefined for every other key.
export function placeAfter(event, place, count) {
  const last = count - 1;
  const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: last }[event.key];
  if (to === undefined) return undefined;
  event.preventDefault();
  return Math.min(Math.max(to, 0), last);
}
