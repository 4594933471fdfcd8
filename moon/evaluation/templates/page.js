(function () {
  "use strict";
  function value(row, column) {
    var cell = row.cells[column];
    var given = cell.getAttribute("data-v");
    if (given === null) return cell.textContent.trim().toLowerCase();
    return given === "" ? null : Number(given);
  }
  function sort(header) {
    var table = header.closest("table"), body = table.tBodies[0];
    var column = Number(header.getAttribute("data-column"));
    // Figures start with the highest first, words with A.
    var first = header.classList.contains("word") ? "ascending" : "descending";
    var other = first === "ascending" ? "descending" : "ascending";
    var order = header.getAttribute("aria-sort") === first ? other : first;
    var sign = order === "ascending" ? 1 : -1;
    var rows = Array.prototype.slice.call(body.rows);
    rows.sort(function (a, b) {
      var x = value(a, column), y = value(b, column);
      if (x === null || y === null) return (x === null) - (y === null);
      return x < y ? -sign : x > y ? sign : 0;
    });
    rows.forEach(function (row) { body.appendChild(row); });
    table.querySelectorAll("th[aria-sort]").forEach(function (th) {
      th.setAttribute("aria-sort", th === header ? order : "none");
    });
  }
  document.querySelectorAll("th[data-column] button").forEach(function (button) {
    button.addEventListener("click", function () { sort(button.closest("th")); });
  });
  var opened = [];
  window.addEventListener("beforeprint", function () {
    opened = Array.prototype.filter.call(document.querySelectorAll("details"), function (d) {
      return !d.open;
    });
    opened.forEach(function (d) { d.open = true; });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (d) { d.open = false; });
  });
})();
