//! Options: what a rule may ask for besides its network and port. The configuration, the state directory and
//! the control API name an option as the field of [`Options`] is named; the command line has a flag for it.

use std::{borrow::Cow, collections::BTreeSet, fmt, marker::PhantomData, num::NonZeroU32, time::Duration};

use jiff::fmt::{
    friendly::{Designator, SpanPrinter},
    serde::unsigned_duration::friendly::compact,
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{
        self, IntoDeserializer as _, MapAccess, SeqAccess, Unexpected, Visitor, value::MapAccessDeserializer,
    },
};

use super::{DatapathChoice, ProxyProtocol, Source, container_name};

/// Declares the options, and lists their names and values from the same fields.
macro_rules! options {
    ($(#[$about:meta])* pub struct Options { $($(#[$attribute:meta])* pub $name:ident: $type:ty,)+ }) => {
        $(#[$about])*
        pub struct Options { $($(#[$attribute])* pub $name: $type,)+ }

        impl Options {
            /// The names of all options.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),+];

            /// Iterates over the options that differ from their defaults.
            pub fn given(&self) -> impl Iterator<Item = (&'static str, Value<'_>)> {
                let options = [$((stringify!($name), self.$name.given())),+];
                options.into_iter().filter_map(|(name, value)| Some((name, value?)))
            }
        }
    };
}

options! {
    /// The options of a rule.
    ///
    /// Serializes all options, as answers of the control API contain them. Files and requests contain only
    /// the options that are given: [`only_given`].
    #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct Options {
        /// Names or ids of the containers that the rule is for. If empty, the rule is for the whole network.
        #[serde(deserialize_with = "containers")]
        pub from: BTreeSet<String>,
        /// True if the port on the containers' own localhost leads to the service, too.
        pub localhost: bool,
        /// The peer that the service sees.
        pub source: Source,
        /// The path that connections take.
        pub path: DatapathChoice,
        /// Largest number of connections at a time; `None` for
        /// [`DEFAULT_CONNECTIONS`](super::DEFAULT_CONNECTIONS). Only relays enforce it, as they do
        /// `idle_timeout` and `proxy_protocol`.
        #[serde(deserialize_with = "connections")]
        pub max_connections: Option<NonZeroU32>,
        /// Time without a byte after which a connection is reset; `None` for no limit.
        #[serde(serialize_with = "compact::optional::serialize", deserialize_with = "time")]
        pub idle_timeout: Option<Duration>,
        /// Version of the PROXY protocol, whose header tells the service who connects; `None` for no header.
        pub proxy_protocol: Option<ProxyProtocol>,
        /// The administrator's comment, one line of text.
        pub comment: Option<String>,
    }
}

/// The value of an option that differs from its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Value<'a> {
    /// `true`: the command's flag has no value.
    Flag(bool),
    /// A number, without a unit.
    Number(u32),
    /// A word or a text.
    Text(Cow<'a, str>),
    /// Several words, in their order.
    List(&'a BTreeSet<String>),
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
            Self::List(words) => f.write_str(&words.iter().map(String::as_str).collect::<Vec<_>>().join(",")),
        }
    }
}

/// The type of an option.
trait Given {
    /// Returns the value; `None` if it is the default.
    fn given(&self) -> Option<Value<'_>>;
}

impl Given for bool {
    fn given(&self) -> Option<Value<'_>> {
        self.then_some(Value::Flag(true))
    }
}

impl Given for NonZeroU32 {
    fn given(&self) -> Option<Value<'_>> {
        Some(Value::Number(self.get()))
    }
}

impl Given for Duration {
    fn given(&self) -> Option<Value<'_>> {
        let printer = SpanPrinter::new().designator(Designator::Compact);
        Some(Value::Text(printer.unsigned_duration_to_string(self).into()))
    }
}

impl Given for String {
    fn given(&self) -> Option<Value<'_>> {
        Some(Value::Text(self.into()))
    }
}

impl Given for BTreeSet<String> {
    fn given(&self) -> Option<Value<'_>> {
        (!self.is_empty()).then_some(Value::List(self))
    }
}

impl Given for Source {
    fn given(&self) -> Option<Value<'_>> {
        (*self != Self::default()).then(|| Value::Text(self.to_string().into()))
    }
}

impl Given for DatapathChoice {
    fn given(&self) -> Option<Value<'_>> {
        (*self != Self::default()).then(|| Value::Text(self.to_string().into()))
    }
}

impl Given for ProxyProtocol {
    fn given(&self) -> Option<Value<'_>> {
        Some(Value::Text(self.to_string().into()))
    }
}

impl<T: Given> Given for Option<T> {
    fn given(&self) -> Option<Value<'_>> {
        self.as_ref()?.given()
    }
}

/// Serializes the options that differ from their defaults.
pub(super) fn only_given<S: Serializer>(options: &Options, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(options.given())
}

/// Parses a text while it is deserialized, so that an error gets the place of the value.
struct Text<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }
}

/// Deserializes a duration, such as `"10m"`; for an optional field.
pub fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    struct Time(Duration);

    impl<'de> Deserialize<'de> for Time {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_str(Text { expected: "a time, as \"30s\" or \"10m\"", parse })
        }
    }

    fn parse(text: &str) -> Result<Time, String> {
        let value: de::value::StrDeserializer<'_, de::value::Error> = text.into_deserializer();
        let time = compact::required::deserialize(value).map(Time);
        time.map_err(|_| format!("{text:?} is not a time; write one like \"30s\" or \"10m\""))
    }

    Ok(Option::<Time>::deserialize(deserializer)?.map(|Time(time)| time))
}

/// Deserializes a number of connections.
fn connections<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NonZeroU32>, D::Error> {
    struct Connections(NonZeroU32);

    struct Number;

    impl Visitor<'_> for Number {
        type Value = Connections;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of connections, at least 1")
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<Connections, E> {
            let connections = u32::try_from(number).ok().and_then(NonZeroU32::new).map(Connections);
            connections.ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<Connections, E> {
            let unsigned =
                u64::try_from(number).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self));
            self.visit_u64(unsigned?)
        }
    }

    impl<'de> Deserialize<'de> for Connections {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_u64(Number)
        }
    }

    Ok(Option::<Connections>::deserialize(deserializer)?.map(|Connections(number)| number))
}

/// Deserializes names or ids of containers.
fn containers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<String>, D::Error> {
    struct Container(String);

    struct Containers;

    impl<'de> Visitor<'de> for Containers {
        type Value = BTreeSet<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of containers, as [\"web\", \"db\"]")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<Self::Value, A::Error> {
            let mut containers = BTreeSet::new();
            while let Some(Container(name)) = names.next_element()? {
                containers.insert(name);
            }
            Ok(containers)
        }
    }

    impl<'de> Deserialize<'de> for Container {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let parse = |text: &str| container_name(text).map(Self).map_err(|error| error.to_string());
            deserializer.deserialize_str(Text { expected: "a container's name or id", parse })
        }
    }

    deserializer.deserialize_seq(Containers)
}

/// The fields that a table has besides the options.
pub trait Beside<'de>: Default {
    /// The contents of the table.
    type Whole;

    /// The names of the fields.
    const FIELDS: &'static [&'static str];

    /// Reads the value of a field; `field` is one of [`Self::FIELDS`].
    fn read<A: MapAccess<'de>>(&mut self, field: &str, table: &mut A) -> Result<(), A::Error>;

    /// Combines the fields with the options, or returns an error about a missing field.
    fn with<E: de::Error>(self, options: Options) -> Result<Self::Whole, E>;
}

/// Deserializes a table of options and other fields. Unlike `#[serde(flatten)]`, which first collects all
/// values, this reads each value where it stands, so that errors tell their place, and refuses unknown
/// fields.
pub fn with_options<'de, T: Beside<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T::Whole, D::Error> {
    deserializer.deserialize_map(Table::<T>(PhantomData))
}

struct Table<T>(PhantomData<T>);

impl<'de, T: Beside<'de>> Visitor<'de> for Table<T> {
    type Value = T::Whole;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a rule")
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Self::Value, A::Error> {
        let mut rest = Rest { table, other: T::default(), read: vec![] };
        let options = Options::deserialize(MapAccessDeserializer::new(&mut rest))?;
        rest.other.with(options)
    }
}

/// The options of a table; reads the other fields by the way.
struct Rest<A, T> {
    table: A,
    other: T,
    /// The other fields that were read.
    read: Vec<&'static str>,
}

impl<'de, A: MapAccess<'de>, T: Beside<'de>> MapAccess<'de> for Rest<A, T> {
    type Error = A::Error;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        while let Some(Field(name, _)) = self.table.next_key::<Field<T>>()? {
            if Options::NAMES.contains(&name) {
                return seed.deserialize(name.into_deserializer()).map(Some);
            }
            if self.read.contains(&name) {
                return Err(de::Error::duplicate_field(name));
            }
            self.other.read(name, &mut self.table)?;
            self.read.push(name);
        }
        Ok(None)
    }

    fn next_value_seed<V: de::DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.table.next_value_seed(seed)
    }
}

/// The name of a field of the table, an option or not.
struct Field<T>(&'static str, PhantomData<T>);

impl<'de, T: Beside<'de>> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = Cow::<str>::deserialize(deserializer)?;
        let mut known = T::FIELDS.iter().chain(Options::NAMES);
        known.find(|known| **known == name).map(|known| Self(known, PhantomData)).ok_or_else(|| {
            let known: Vec<_> =
                T::FIELDS.iter().chain(Options::NAMES).map(|known| format!("`{known}`")).collect();
            de::Error::custom(format!("unknown field `{name}`, expected one of {}", known.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_given_as_it_is_serialized() {
        let all = Options {
            from: ["web".to_owned()].into(),
            localhost: true,
            source: Source::Loopback,
            path: DatapathChoice::Steer,
            max_connections: NonZeroU32::new(5),
            idle_timeout: Some(Duration::from_millis(600_500)),
            proxy_protocol: Some(ProxyProtocol::V2),
            comment: Some("why".to_owned()),
        };
        let json = serde_json::to_value(&all).unwrap();
        let given: serde_json::Map<_, _> = all
            .given()
            .map(|(name, value)| (name.to_owned(), serde_json::to_value(value).unwrap()))
            .collect();
        assert_eq!(serde_json::Value::Object(given), json);
        assert_eq!(all.given().map(|(name, _)| name).collect::<Vec<_>>(), Options::NAMES);
        assert_eq!(serde_json::from_value::<Options>(json).unwrap(), all);
        assert_eq!(Options::default().given().count(), 0);
    }
}
