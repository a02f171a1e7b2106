//! markdown: the width of lines of Markdown, the links and their anchors, and the guide's table of contents.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use super::Finding;

/// The width of a line, in columns.
const WIDTH: usize = 140;

/// The folder of the guide's chapters.
const GUIDE: &str = "docs/guide/src";
/// The guide's table of contents, which mdBook builds the book from.
const SUMMARY: &str = "SUMMARY.md";

/// A line of a document.
pub(super) struct Line<'a> {
    /// The line's number, from 1.
    pub(super) number: usize,
    pub(super) text: &'a str,
    /// The language of the code block that the line is in; empty if the block names none.
    pub(super) block: Option<&'a str>,
}

/// Splits a document into lines, without the fences of code blocks.
pub(super) fn lines(text: &str) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    let mut block = None;
    for (index, text) in text.lines().enumerate() {
        match text.trim_start().strip_prefix("```") {
            Some(language) => block = if block.is_some() { None } else { Some(language.trim()) },
            None => lines.push(Line { number: index + 1, text, block }),
        }
    }
    lines
}

/// Checks the width of a document's lines. Rows of tables have none, nor have commands and their output,
/// which is quoted as it is. Targets of links do not count.
pub(super) fn check(path: &Path, text: &str) -> Vec<Finding> {
    let is_fixed = |line: &Line<'_>| match line.block {
        Some(language) => matches!(language, "console" | "text"),
        None => line.text.trim_start().starts_with('|'),
    };
    lines(text)
        .into_iter()
        .filter(|line| !is_fixed(line))
        .filter_map(|line| {
            let in_links: usize = targets(line.text).iter().map(|target| target.chars().count()).sum();
            let columns = line.text.chars().count().saturating_sub(in_links);
            let text = format!("{columns} columns, {WIDTH} at most");
            (columns > WIDTH).then(|| Finding::new(path, line.number, text))
        })
        .collect()
}

/// Checks that every relative link of every document leads to a file, and its anchor to a heading there.
pub(super) fn links(files: &BTreeMap<PathBuf, String>) -> Vec<Finding> {
    let documents: BTreeMap<_, _> = files.iter().filter(|(path, _)| is_document(path)).collect();
    let mut findings = Vec::new();
    for (path, text) in &documents {
        for line in lines(text).into_iter().filter(|line| line.block.is_none()) {
            for target in targets(&without_code(line.text)) {
                if target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                let file = if file.is_empty() { PathBuf::clone(path) } else { resolve(path, file) };
                let is_there =
                    files.contains_key(&file) || files.keys().any(|known| known.starts_with(&file));
                let has_heading = || documents.get(&file).is_some_and(|text| anchors(text).contains(anchor));
                if !is_there {
                    findings.push(Finding::new(path, line.number, format!("{target}: no such file")));
                } else if !anchor.is_empty() && !has_heading() {
                    findings.push(Finding::new(path, line.number, format!("{target}: no such heading")));
                }
            }
        }
    }
    findings
}

/// Checks that documents exist that a text calls by their path from the root, `docs/….md`.
pub(super) fn mentions(path: &Path, text: &str) -> Vec<Finding> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for (at, _) in line.match_indices("docs/") {
            let is_start = !line[..at].ends_with(|c: char| is_name(c) || c == '*');
            let name = &line[at..];
            let name = &name[..name.find(|c| !is_name(c)).unwrap_or(name.len())];
            let name = name.trim_end_matches('.');
            if is_start && is_document(Path::new(name)) && !crate::workspace::root().join(name).exists() {
                findings.push(Finding::new(path, index + 1, format!("{name}: no such file")));
            }
        }
    }
    findings
}

/// Checks that the guide's table of contents has every chapter. That each of its links leads to a chapter is
/// checked by [`links`].
pub(super) fn summary(files: &BTreeMap<PathBuf, String>) -> Vec<Finding> {
    let summary = Path::new(GUIDE).join(SUMMARY);
    let contents = files.get(&summary).map_or("", String::as_str);
    let listed: BTreeSet<_> = targets(contents).into_iter().map(|target| resolve(&summary, target)).collect();
    files
        .keys()
        .filter(|path| path.starts_with(GUIDE) && is_document(path))
        .filter(|path| **path != summary && !listed.contains(*path))
        .map(|path| Finding {
            place: path.display().to_string(),
            line: None,
            text: format!("not in {SUMMARY}"),
        })
        .collect()
}

fn is_document(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

/// Lists the targets of links in a text: `[text](target)`, and `[name]: target`.
fn targets(text: &str) -> Vec<&str> {
    let inline = text.match_indices("](").map(|(at, opening)| &text[at + opening.len()..]);
    let inline = inline.filter_map(|rest| rest.find([')', ' ']).map(|end| &rest[..end]));
    let definition = text.strip_prefix('[').and_then(|rest| rest.split_once("]: "));
    inline.chain(definition.and_then(|(_, target)| target.split_whitespace().next())).collect()
}

/// Removes code spans from a line.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("``")
}

/// Returns the path from the root that a link in `document` means.
fn resolve(document: &Path, target: &str) -> PathBuf {
    let mut path = document.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    for component in Path::new(target).components() {
        match component {
            Component::ParentDir => drop(path.pop()),
            Component::Normal(name) => path.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => (),
        }
    }
    path
}

/// Lists the anchors of a document's headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let mut anchors = BTreeSet::new();
    for line in lines(text).iter().filter(|line| line.block.is_none()) {
        let heading = line.text.trim_start_matches('#');
        if heading.len() == line.text.len() || !heading.starts_with(' ') {
            continue;
        }
        let anchor: String = heading
            .trim()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .flat_map(char::to_lowercase)
            .collect();
        let count = counts.entry(anchor.clone()).or_default();
        anchors.insert(if *count == 0 { anchor } else { format!("{anchor}-{count}") });
        *count += 1;
    }
    anchors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(texts: &[(&str, &str)]) -> BTreeMap<PathBuf, String> {
        texts.iter().map(|(path, text)| (path.into(), (*text).to_owned())).collect()
    }

    fn texts(findings: Vec<Finding>) -> Vec<String> {
        findings.into_iter().map(|finding| finding.to_string()).collect()
    }

    #[test]
    fn prose_has_a_width() {
        let path = Path::new("a.md");
        let wide = "word ".repeat(30);
        assert_eq!(check(path, &format!("a\n\n{wide}\n")).len(), 1);
        assert_eq!(check(path, &format!("```\n{wide}\n```\n")).len(), 1);
        assert_eq!(check(path, &format!("```console\n{wide}\n```\n")), []);
        assert_eq!(check(path, &format!("| {wide} |\n")), []);
        assert_eq!(check(path, &format!("[a]({})\n", "b".repeat(150))), []);
    }

    #[test]
    fn links_lead_to_files_and_headings() {
        let files = documents(&[
            ("README.md", "[a](text/a.md) [b](text/a.md#the-other-way) [folder](text) [up](#top)\n# Top\n"),
            ("text/a.md", "# The other *way*!\n[r](../README.md#top) [x](https://example.org/#y)\n"),
        ]);
        assert_eq!(links(&files), []);
        let files = documents(&[
            ("README.md", "[a](a.md) [b](text/a.md#b)\n\n[c]: nowhere\n`[d](d.md)`\n```\n[e](e.md)\n```\n"),
            ("text/a.md", "```\n# B\n```\n[r](README.md)\n"),
        ]);
        let found = [
            "README.md:1: a.md: no such file",
            "README.md:1: text/a.md#b: no such heading",
            "README.md:3: nowhere: no such file",
            "text/a.md:4: README.md: no such file",
        ];
        assert_eq!(texts(links(&files)), found);
    }

    #[test]
    fn anchors_are_made_as_by_their_readers() {
        let text = "# Some containers: `--from`\n## Limits\n## Limits\n#no heading\n";
        assert_eq!(anchors(text), ["some-containers---from", "limits", "limits-1"].map(str::to_owned).into());
    }

    #[test]
    fn the_guide_lists_its_chapters() {
        let chapter = |name: &str| format!("{GUIDE}/{name}");
        let files = documents(&[
            (&chapter(SUMMARY), "- [A](a.md)\n"),
            (&chapter("a.md"), ""),
            (&chapter("b.md"), ""),
        ]);
        assert_eq!(texts(summary(&files)), [format!("{GUIDE}/b.md: not in SUMMARY.md")]);
    }

    #[test]
    fn documents_that_are_named_exist() {
        let path = Path::new("a.rs");
        assert_eq!(mentions(path, "see docs/architecture.md. /usr/share/docs/x.md, ../docs/*.md\n"), []);
        // Not spelt out, or this file would be found to name it.
        let none = ["docs", "none.md"].join("/");
        assert_eq!(
            texts(mentions(path, &format!("\n// {none}\n"))),
            [format!("a.rs:2: {none}: no such file")]
        );
    }
}
