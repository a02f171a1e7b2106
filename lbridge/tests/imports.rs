//! The law of imports, checked on the source text of the crate: the ladder between rooms (the modules of the
//! crate root) that `lib.rs` states, and no circles between the modules of a room.
//!
//! An import is a path in a `use`, an expression, a type or a macro's arguments that leads to another module,
//! also through a re-export. A module and its own children may import each other; modules with the same
//! parent must not do so in a circle. What `#[cfg(test)]` is on does not count.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    slice,
    sync::LazyLock,
};

use syn::{
    Attribute, Item, ItemMod, UseTree,
    visit::{self, Visit},
};

/// Imports that the ladder forbids, and that are allowed: the importing room, and the module that it imports.
const EXCEPTIONS: [(&str, &str); 5] = [
    ("firewall", "host::listeners"),
    ("firewall", "host::netlink"),
    ("firewall", "host::scratch"),
    ("kernel", "host::trusted"),
    ("relay", "host::trusted"),
];

/// Rooms that only some modules may import, though the ladder would let others: the room, and its importers.
const RESERVED: [(&str, &[&str]); 4] = [
    ("daemon", &["cli::run"]),
    ("sandbox_relay", &["cli::relay"]),
    ("migrate", &["doctor::leftovers", "import"]),
    ("sandbox", &["cli::relay", "sandbox_relay"]),
];

/// Circles that cannot be opened: the parent of the modules, and the modules.
const KNOWN_CIRCLES: [(&str, &[&str]); 0] = [];

static SOURCE: LazyLock<Source> = LazyLock::new(Source::read);

#[test]
fn rooms_import_only_what_stands_to_their_left() {
    let ladder = ladder(&SOURCE.docs);
    let rooms: BTreeSet<_> = SOURCE.modules.keys().filter(|path| path.len() == 1).map(|p| &*p[0]).collect();
    assert_eq!(
        rooms,
        ladder.keys().map(String::as_str).collect(),
        "rooms, and those of the ladder in lib.rs"
    );
    let (mut found, mut used) = (vec![], BTreeSet::new());
    for import in SOURCE.imports() {
        let (from, to) = (&*import.from[0], &*import.to[0]);
        if from == to {
            continue;
        }
        let exception = EXCEPTIONS.into_iter().find(|(room, module)| from == *room && import.is_of(module));
        if let Some(exception) = exception {
            used.insert(exception);
        } else if ladder[from] <= ladder[to] {
            found.push(import.shown());
        }
    }
    assert!(found.is_empty(), "against the ladder in lib.rs:\n{}", found.join("\n"));
    let unused: Vec<_> = EXCEPTIONS.into_iter().filter(|exception| !used.contains(exception)).collect();
    assert!(unused.is_empty(), "exceptions that nothing needs: {unused:?}");
}

#[test]
fn some_rooms_have_few_importers() {
    let (mut found, mut used) = (vec![], BTreeSet::new());
    for import in SOURCE.imports() {
        for (room, importers) in RESERVED {
            if import.to[0] != room || import.from[0] == room {
                continue;
            }
            match importers.iter().find(|importer| starts_with(&import.from, importer)) {
                Some(importer) => drop(used.insert((room, *importer))),
                None => found.push(import.shown()),
            }
        }
    }
    assert!(found.is_empty(), "imports of a room that only others may import:\n{}", found.join("\n"));
    let all = RESERVED.into_iter().flat_map(|(room, importers)| importers.iter().map(move |by| (room, *by)));
    let unused: Vec<_> = all.filter(|importer| !used.contains(importer)).collect();
    assert!(unused.is_empty(), "importers that import nothing: {unused:?}");
}

#[test]
fn modules_of_a_room_do_not_import_each_other_in_a_circle() {
    let (mut report, mut new, mut known) = (String::new(), false, KNOWN_CIRCLES.to_vec());
    for circle in SOURCE.circles() {
        let members: Vec<_> = circle.members.iter().map(String::as_str).collect();
        let expected = known.iter().position(|(parent, all)| *parent == circle.parent && *all == members);
        match expected {
            Some(position) => drop(known.swap_remove(position)),
            None => new = true,
        }
        let _ = writeln!(report, "{}: {members:?}\n{}", circle.parent, circle.imports.join("\n"));
    }
    assert!(!new, "import circles:\n{report}");
    assert!(known.is_empty(), "circles that are not there any more; remove from KNOWN_CIRCLES: {known:?}");
}

#[test]
fn the_ladder_is_the_same_in_the_documentation() {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let architecture = fs::read_to_string(root.join("../docs/architecture.md")).unwrap();
    assert!(words(&architecture).contains(&words(ladder_text(&SOURCE.docs))), "docs/architecture.md");
}

#[test]
fn every_kind_of_import_is_seen() {
    let source = Source::of(&[
        ("lib.rs", "mod a; mod b; mod c; mod d; mod e;"),
        ("a/mod.rs", "mod x; mod y; mod z; use y::Item; fn f() { x::f() }"),
        ("a/x.rs", "use super::{z, Item}; fn f() { tokio::select! { _ = crate::b::f() => () } }"),
        ("a/y.rs", "mod inner { fn f(_: super::super::z::Z) -> crate::c::C { crate::c::C } }"),
        (
            "a/z.rs",
            "use super::x as other; #[cfg(test)] mod tests { use crate::d; } #[cfg(test)] use crate::e;",
        ),
        ("b.rs", ""),
        ("c.rs", "use crate::a::Item;"),
        ("d.rs", "#[cfg(test)] fn f() { crate::a::f() }"),
        ("e.rs", "mod deep;"),
        ("e/deep.rs", ""),
    ]);
    let imports: BTreeSet<_> =
        source.imports().into_iter().map(|import| (import.from.join("::"), import.to.join("::"))).collect();
    let expected = [
        ("a", "a::x"),
        ("a", "a::y"),
        ("a::x", "a::y"), // by way of the parent's `use`
        ("a::x", "a::z"),
        ("a::x", "b"),
        ("a::y", "a::z"),
        ("a::y", "c"),
        ("a::z", "a::x"),
        ("c", "a::y"),
    ];
    assert_eq!(imports, expected.map(|(from, to)| (from.to_owned(), to.to_owned())).into());
    let circles: Vec<_> =
        source.circles().into_iter().map(|circle| (circle.parent, circle.members)).collect();
    let expected = [("crate", vec!["a", "c"]), ("a", vec!["x", "y", "z"])];
    let owned = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(circles, expected.map(|(parent, names)| (parent.to_owned(), owned(names))));
}

/// Path of a module below the crate root; empty for the root.
type ModulePath = Vec<String>;

/// The modules of the crate, without those of tests.
struct Source {
    modules: BTreeMap<ModulePath, Module>,
    /// Documentation of the crate root.
    docs: String,
}

/// A module that has a file of its own. Modules inside it count as part of it.
#[derive(Default)]
struct Module {
    file: PathBuf,
    /// Names that `use` brings into scope, with the paths that they stand for.
    names: BTreeMap<String, Vec<String>>,
    /// Every path that may lead to another module, from the crate root.
    paths: BTreeSet<Vec<String>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    from: ModulePath,
    to: ModulePath,
    file: PathBuf,
}

impl Import {
    fn is_of(&self, module: &str) -> bool {
        starts_with(&self.to, module)
    }

    fn shown(&self) -> String {
        format!("  {} imports {}", self.file.display(), self.to.join("::"))
    }
}

fn starts_with(path: &[String], prefix: &str) -> bool {
    let mut path = path.iter();
    prefix.split("::").all(|segment| path.next().is_some_and(|own| own == segment))
}

/// Modules of one parent, each of which imports every other one, if only through others.
struct Circle {
    parent: String,
    members: Vec<String>,
    imports: Vec<String>,
}

impl Source {
    fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        Self::new(&|file| fs::read_to_string(root.join(file)).ok())
    }

    fn of(files: &[(&str, &str)]) -> Self {
        let text = |file: &Path| files.iter().find(|(name, _)| Path::new(name) == file);
        Self::new(&|file| text(file).map(|(_, text)| (*text).to_owned()))
    }

    fn new(read: &dyn Fn(&Path) -> Option<String>) -> Self {
        let mut source = Self { modules: BTreeMap::new(), docs: String::new() };
        let text = read(Path::new("lib.rs")).expect("there is no lib.rs");
        source.docs = text.lines().map_while(|line| line.strip_prefix("//!")).collect::<Vec<_>>().join("\n");
        source.add(read, vec![], "lib.rs".into(), &text);
        source
    }

    fn add(&mut self, read: &dyn Fn(&Path) -> Option<String>, path: ModulePath, file: PathBuf, text: &str) {
        let parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut reader = Reader { place: path.clone(), ..Reader::default() };
        reader.visit_file(&parsed);
        for child in &reader.children {
            let path = [&*path, slice::from_ref(child)].concat();
            let folder: PathBuf = path.iter().collect();
            let (flat, nested) = (folder.with_extension("rs"), folder.join("mod.rs"));
            let (file, text) = [flat, nested]
                .into_iter()
                .find_map(|file| read(&file).map(|text| (file, text)))
                .unwrap_or_else(|| panic!("{}: no file for `mod {child}`", file.display()));
            self.add(read, path, file, &text);
        }
        let Reader { names, paths, .. } = reader;
        self.modules.insert(path, Module { file, names, paths });
    }

    /// Returns the module that a path leads to, through names that `use` has brought into modules on the way.
    fn resolve(&self, path: &[String], steps: usize) -> ModulePath {
        let mut place = vec![];
        for (position, segment) in path.iter().enumerate() {
            let child = [&*place, slice::from_ref(segment)].concat();
            if self.modules.contains_key(&child) {
                place = child;
                continue;
            }
            return match self.modules.get(&place).and_then(|module| module.names.get(segment)) {
                // A name may stand for itself, as in `use x; use x as y`.
                Some(name) if steps > 0 => self.resolve(&[name, &path[position + 1..]].concat(), steps - 1),
                _ => place,
            };
        }
        place
    }

    /// Lists the imports of every module from others.
    fn imports(&self) -> BTreeSet<Import> {
        let mut imports = BTreeSet::new();
        for (from, module) in &self.modules {
            for path in &module.paths {
                let to = self.resolve(path, 8);
                // The paths of other crates lead to the root.
                if !to.is_empty() && !from.starts_with(&to) {
                    imports.insert(Import { from: from.clone(), to, file: module.file.clone() });
                }
            }
        }
        imports
    }

    /// Finds the circles between modules with the same parent.
    fn circles(&self) -> Vec<Circle> {
        let mut parents: BTreeMap<ModulePath, BTreeMap<(String, String), Import>> = BTreeMap::new();
        for import in self.imports() {
            let shared = import.from.iter().zip(&import.to).take_while(|(from, to)| from == to).count();
            // Between a module and its own descendants.
            let (Some(from), Some(to)) = (import.from.get(shared), import.to.get(shared)) else { continue };
            let edge = (from.clone(), to.clone());
            parents.entry(import.from[..shared].to_vec()).or_default().entry(edge).or_insert(import);
        }
        let mut circles = vec![];
        for (parent, edges) in parents {
            let parent = if parent.is_empty() { "crate".to_owned() } else { parent.join("::") };
            let modules: BTreeSet<&String> = edges.keys().map(|(from, _)| from).collect();
            let mut done = BTreeSet::new();
            for module in modules {
                let reached = reached_from(module, &edges);
                let members: BTreeSet<&String> = reached
                    .iter()
                    .copied()
                    .filter(|other| reached_from(other, &edges).contains(module))
                    .collect();
                if members.is_empty() || !done.insert(members.clone()) {
                    continue;
                }
                let inside = edges.iter().filter(|((a, b), _)| members.contains(a) && members.contains(b));
                let imports = inside.map(|(_, import)| import.shown()).collect();
                let members = members.into_iter().cloned().collect();
                circles.push(Circle { parent: parent.clone(), members, imports });
            }
        }
        circles
    }
}

/// Lists the modules that `from` imports, also through others; itself if it is in a circle.
fn reached_from<'a>(from: &str, edges: &'a BTreeMap<(String, String), Import>) -> BTreeSet<&'a String> {
    let (mut reached, mut next) = (BTreeSet::new(), VecDeque::from([from]));
    while let Some(module) = next.pop_front() {
        for (_, to) in edges.keys().filter(|(from, _)| from == module) {
            if reached.insert(to) {
                next.push_back(to);
            }
        }
    }
    reached
}

/// Reads the paths of one file.
#[derive(Default)]
struct Reader {
    /// Path of the module that is being read, which may be one inside the file.
    place: ModulePath,
    /// Depth of modules inside the file.
    depth: usize,
    /// Child modules with files of their own.
    children: Vec<String>,
    names: BTreeMap<String, Vec<String>>,
    paths: BTreeSet<Vec<String>>,
}

impl Reader {
    /// Notes a path, and returns it as it is from the crate root.
    fn note(&mut self, segments: &[String]) -> Vec<String> {
        let mut place = self.place.clone();
        let mut rest = segments;
        match segments.first().map(String::as_str) {
            Some("crate") => (place, rest) = (vec![], &segments[1..]),
            Some("self") => rest = &segments[1..],
            _ => {
                while let Some(("super", after)) =
                    rest.split_first().map(|(first, rest)| (first.as_str(), rest))
                {
                    place.pop();
                    rest = after;
                }
            }
        }
        let path = [&*place, rest].concat();
        self.paths.insert(path.clone());
        path
    }

    fn take(&mut self, tree: &UseTree, before: &[String]) {
        let with =
            |segment: String| if segment == "self" { before.to_vec() } else { [before, &[segment]].concat() };
        let (path, name) = match tree {
            UseTree::Path(path) => {
                return self.take(&path.tree, &[before, &[path.ident.to_string()]].concat());
            }
            UseTree::Group(group) => return group.items.iter().for_each(|tree| self.take(tree, before)),
            UseTree::Glob(_) => return drop(self.note(before)),
            UseTree::Name(name) => (with(name.ident.to_string()), None),
            UseTree::Rename(rename) => (with(rename.ident.to_string()), Some(rename.rename.to_string())),
        };
        let name = name.or_else(|| path.last().cloned());
        let path = self.note(&path);
        if let Some(name) = name.filter(|_| self.depth == 0) {
            self.names.insert(name, path);
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Const(item) => &item.attrs,
            Item::Enum(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Mod(item) => &item.attrs,
            Item::Static(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            Item::Trait(item) => &item.attrs,
            Item::Type(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            _ => &vec![],
        };
        if !attributes.iter().any(is_for_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let name = module.ident.to_string();
        if module.content.is_none() {
            assert_eq!(self.depth, 0, "a module inside a file has `mod {name};`");
            self.children.push(name);
            return;
        }
        self.place.push(name);
        self.depth += 1;
        visit::visit_item_mod(self, module);
        self.depth -= 1;
        self.place.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if item.leading_colon.is_none() {
            self.take(&item.tree, &[]);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.note(&segments);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        // The arguments may be of any syntax: everything that reads like a path counts.
        let text = called.tokens.to_string().replace("::", " :: ");
        let mut path: Vec<String> = vec![];
        let mut joined = false;
        for token in
            text.split(|c: char| c != ':' && c != '_' && !c.is_alphanumeric()).filter(|t| !t.is_empty())
        {
            if token == "::" {
                joined = true;
            } else if joined {
                path.push(token.to_owned());
                joined = false;
            } else {
                self.note(&path);
                path = vec![token.to_owned()];
            }
        }
        self.note(&path);
        visit::visit_macro(self, called);
    }
}

/// Returns true for `#[cfg(test)]`.
fn is_for_tests(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
}

/// Returns the ladder as the documentation has it, from its first room to the last.
fn ladder_text(docs: &str) -> &str {
    let start = docs.find("lbridge_common <-").expect("lib.rs states the ladder");
    let length = docs[start..].find("```").expect("the ladder ends");
    &docs[start..start + length]
}

/// Returns the rung of each room, the leftmost first.
fn ladder(docs: &str) -> BTreeMap<String, usize> {
    let rungs = ladder_text(docs).split("<-").skip(1).enumerate();
    rungs
        .flat_map(|(rung, rooms)| {
            let rooms = rooms.split(|c: char| c != '_' && !c.is_alphanumeric());
            rooms.filter(|room| !room.is_empty()).map(move |room| (room.to_owned(), rung))
        })
        .collect()
}
