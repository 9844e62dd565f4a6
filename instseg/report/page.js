"use strict";
// A gallery is sorted and filtered by the data-* attributes of its articles; without this script all of it is shown.
for (const gallery of document.querySelectorAll(".gallery")) {
  const articles = [...gallery.querySelectorAll("article")];
  const [sort, label, kind] = ["sort", "label", "kind"].map((name) => gallery.querySelector(`select[name=${name}]`));
  const count = gallery.querySelector("output");
  const score = (article) => Number(article.dataset.score);
  const orders = {
    worst: (a, b) => score(a) - score(b),
    best: (a, b) => score(b) - score(a),
    name: (a, b) => (a.dataset.name < b.dataset.name ? -1 : 1),
  };
  const has = (article, names, select) => !select.value || article.dataset[names].split(" ").includes(select.value);
  const update = () => {
    articles.sort(orders[sort.value]);
    let shown = 0;
    for (const article of articles) {
      article.hidden = !(has(article, "labels", label) && has(article, "kinds", kind));
      shown += !article.hidden;
      gallery.append(article);
    }
    count.value = `${shown} of ${articles.length} images`;
  };
  for (const select of [sort, label, kind]) select.addEventListener("change", update);
  gallery.querySelector(".controls").hidden = false;
  update();
}
